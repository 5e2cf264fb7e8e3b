-- Pausing: a job that was paused before its files were validated goes back to validation, never past it.

INSERT INTO job_edges VALUES ('paused', 'validating_files');

CREATE OR REPLACE FUNCTION jobs_history() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    told text;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.status = OLD.status THEN
        RETURN NEW;
    END IF;
    told := CASE
        WHEN TG_OP = 'INSERT' THEN 'Created fine-tuning job: ' || NEW.id
        WHEN NEW.status = 'validating_files' THEN 'Fine-tuning job resumed; its files are validated first'
        WHEN NEW.status = 'queued' AND OLD.status = 'validating_files' THEN 'Files validated, moving job to queued state'
        WHEN NEW.status = 'queued' AND OLD.status = 'running' THEN 'The run was interrupted; the job waits to go on from its last checkpoint'
        WHEN NEW.status = 'queued' THEN 'Fine-tuning job resumed'
        WHEN NEW.status = 'running' THEN 'Fine-tuning job started'
        WHEN NEW.status = 'paused' THEN 'Fine-tuning job paused'
        WHEN NEW.status = 'succeeded' THEN 'The job has successfully completed'
        WHEN NEW.status = 'failed' THEN 'The job failed: ' || coalesce(NEW.error ->> 'message', 'no reason was given')
        WHEN NEW.status = 'cancelled' THEN 'Fine-tuning job cancelled'
        ELSE 'Job is now ' || NEW.status
    END;
    INSERT INTO job_events (job_id, seq, id, level, type, message, data)
    VALUES (NEW.id, NEW.next_event_seq, 'ftevent-' || replace(gen_random_uuid()::text, '-', ''),
            CASE WHEN NEW.status = 'failed' THEN 'error' ELSE 'info' END, 'message', told,
            jsonb_build_object('status', NEW.status, 'epoch', NEW.epoch));
    NEW.next_event_seq := NEW.next_event_seq + 1;
    RETURN NEW;
END $$;
