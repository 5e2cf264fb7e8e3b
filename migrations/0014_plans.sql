-- What a job would come to, worked out without making one: an executor reads and counts the data, the API plans for its hosts.
--
-- An executor takes a plan until `taken_until` and renews; whatever it writes carries the epoch of its hold. Plans are answers to
-- a question asked a moment ago: they are deleted after a day.

CREATE TABLE plans (
    id                text PRIMARY KEY,
    model             text NOT NULL,
    training_files    text[] NOT NULL,
    validation_files  text[] NOT NULL DEFAULT '{}',
    training          jsonb NOT NULL,               -- domain::TrainingSpec, resolved
    status            text NOT NULL DEFAULT 'queued' CHECK (status IN ('queued', 'ready', 'failed')),
    summary           jsonb,                        -- domain::progress::DataSummary
    error             jsonb,                        -- {code, message, param}
    created_at        timestamptz NOT NULL DEFAULT now(),
    epoch             bigint NOT NULL DEFAULT 0,
    taken_until       timestamptz,
    CHECK ((summary IS NOT NULL) = (status = 'ready')),
    CHECK ((error IS NOT NULL) = (status = 'failed')),
    CHECK (taken_until IS NULL OR status = 'queued')
);
CREATE INDEX plans_waiting ON plans (created_at) WHERE status = 'queued';
