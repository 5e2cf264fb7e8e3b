-- Webhooks: who is told of the end of jobs, and what is still to be told.
--
-- A message is written by the trigger in the transaction that ends the job, so none is lost and none is told of an end that
-- did not happen. Senders take messages under a short lease, in `next_try`: one that dies leaves them to the next.

CREATE TABLE webhooks (
    id          text PRIMARY KEY,
    seq         bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    name        text NOT NULL,
    url         text NOT NULL,
    events      text[] NOT NULL,
    secret      text NOT NULL,                      -- whsec_<base64>: signing needs it as it is
    created_at  timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE webhook_messages (
    id          text PRIMARY KEY,                   -- the webhook-id, the same at every try
    webhook_id  text NOT NULL REFERENCES webhooks ON DELETE CASCADE,
    event       text NOT NULL,
    job_id      text NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    tries       int NOT NULL DEFAULT 0,
    next_try    timestamptz DEFAULT now(),          -- NULL once it was delivered or given up
    delivered   boolean NOT NULL DEFAULT false,
    last_error  text
);
CREATE INDEX webhook_messages_due ON webhook_messages (webhook_id, next_try) WHERE next_try IS NOT NULL;

CREATE FUNCTION jobs_tell_webhooks() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO webhook_messages (id, webhook_id, event, job_id)
    SELECT 'evt_' || replace(gen_random_uuid()::text, '-', ''), id, 'fine_tuning.job.' || NEW.status, NEW.id
    FROM webhooks WHERE 'fine_tuning.job.' || NEW.status = ANY (events);
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_tell_webhooks AFTER UPDATE ON jobs FOR EACH ROW
    WHEN (NEW.status <> OLD.status AND NEW.status IN ('succeeded', 'failed', 'cancelled'))
    EXECUTE FUNCTION jobs_tell_webhooks();
