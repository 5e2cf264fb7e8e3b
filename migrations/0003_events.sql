-- What a customer sees happening, and one row of numbers per optimizer step.
--
-- seq is gap-free per job and given out under the job's row lock, so that whoever reads "after seq n" can miss nothing:
-- a global sequence commits out of order.

CREATE TABLE job_events (
    job_id      text NOT NULL REFERENCES jobs ON DELETE CASCADE,
    seq         bigint NOT NULL,
    id          text NOT NULL UNIQUE,
    level       text NOT NULL CHECK (level IN ('info', 'warn', 'error')),
    type        text NOT NULL CHECK (type IN ('message', 'metrics')),
    message     text NOT NULL,
    data        jsonb,
    created_at  timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, seq)
);

-- Every status change is an event, whoever made it.
CREATE FUNCTION jobs_history() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    told text;
BEGIN
    IF TG_OP = 'UPDATE' AND NEW.status = OLD.status THEN
        RETURN NEW;
    END IF;
    told := CASE
        WHEN TG_OP = 'INSERT' THEN 'Created fine-tuning job: ' || NEW.id
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
-- BEFORE, so that next_event_seq is written with the same row version; the deferred foreign key lets an INSERT's event precede its job.
ALTER TABLE job_events ALTER CONSTRAINT job_events_job_id_fkey DEFERRABLE INITIALLY DEFERRED;
CREATE TRIGGER jobs_zz_history BEFORE INSERT OR UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_history();

CREATE TABLE job_steps (
    job_id      text NOT NULL REFERENCES jobs ON DELETE CASCADE,
    step        bigint NOT NULL,
    metrics     jsonb NOT NULL,                     -- trainer::protocol::StepMetrics, and valid_* where an evaluation fell on the step
    PRIMARY KEY (job_id, step)
);
