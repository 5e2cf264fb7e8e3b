-- Jobs, their states, and the lease under which one executor holds one job.
--
-- The database enforces the state machine: whatever writes here, a job can only take the edges of job_edges, holds a lease
-- exactly while it runs, and is finished exactly when it is terminal.

CREATE TYPE job_status AS ENUM
    ('validating_files', 'queued', 'running', 'paused', 'succeeded', 'failed', 'cancelled');

CREATE TABLE job_edges (
    old  job_status NOT NULL,
    new  job_status NOT NULL,
    PRIMARY KEY (old, new)
);
INSERT INTO job_edges VALUES
    ('validating_files', 'queued'), ('validating_files', 'paused'), ('validating_files', 'failed'), ('validating_files', 'cancelled'),
    ('queued', 'running'), ('queued', 'paused'), ('queued', 'failed'), ('queued', 'cancelled'),
    ('running', 'queued'), ('running', 'paused'), ('running', 'succeeded'), ('running', 'failed'), ('running', 'cancelled'),
    ('paused', 'queued'), ('paused', 'cancelled');

CREATE TABLE jobs (
    id                text PRIMARY KEY,
    seq               bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    status            job_status NOT NULL DEFAULT 'validating_files',
    model             text NOT NULL,                -- name of the base model, as asked
    training_file     text NOT NULL,
    validation_file   text,
    -- Every file in the order of training, as file ids: training_file and validation_file are the first of each.
    training_files    text[] NOT NULL,
    validation_files  text[] NOT NULL DEFAULT '{}',
    request           jsonb NOT NULL,               -- the accepted body, for echoing method, hyperparameters, training
    training          jsonb NOT NULL,               -- domain::TrainingSpec, resolved
    suffix            text,
    seed              bigint NOT NULL,
    metadata          jsonb,
    -- What the request asks of the one who holds the job. The holder acts on it and then takes the edge.
    wanted            text CHECK (wanted IN ('cancel', 'pause')),
    -- Results.
    fine_tuned_model  text,
    trained_tokens    bigint,
    error             jsonb,                        -- {code, message, param}
    estimated_finish  timestamptz,
    progress          jsonb,                        -- last step's metrics, overwritten
    created_at        timestamptz NOT NULL DEFAULT now(),
    started_at        timestamptz,
    finished_at       timestamptz,
    -- The lease. epoch is the fencing token: it rises with every claim and every reclaim, and each write of a holder carries it.
    priority          int NOT NULL DEFAULT 0,
    epoch             bigint NOT NULL DEFAULT 0,
    lease_owner       text,
    lease_until       timestamptz,
    -- Claims since the last new checkpoint: a job that makes progress may outlive any number of hosts.
    attempts          int NOT NULL DEFAULT 0,
    run_after         timestamptz NOT NULL DEFAULT now(),  -- back-off after a failed attempt
    next_event_seq    bigint NOT NULL DEFAULT 1,
    CHECK ((lease_owner IS NULL) = (lease_until IS NULL)),
    CHECK (status <> 'running' OR lease_owner IS NOT NULL),
    -- validating_files may be held too: reading the data is an executor's work.
    CHECK (lease_owner IS NULL OR status IN ('validating_files', 'running')),
    CHECK ((finished_at IS NOT NULL) = (status IN ('succeeded', 'failed', 'cancelled')))
);
CREATE INDEX jobs_claimable ON jobs (priority DESC, seq) WHERE status IN ('validating_files', 'queued');
CREATE INDEX jobs_leased ON jobs (lease_until) WHERE lease_owner IS NOT NULL;

CREATE FUNCTION jobs_guard() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.epoch < OLD.epoch THEN
        RAISE EXCEPTION 'job %: epoch may not fall', OLD.id USING ERRCODE = 'check_violation', CONSTRAINT = 'jobs_epoch';
    END IF;
    IF NEW.status <> OLD.status AND NOT EXISTS (SELECT 1 FROM job_edges e WHERE e.old = OLD.status AND e.new = NEW.status) THEN
        RAISE EXCEPTION 'job %: % may not become %', OLD.id, OLD.status, NEW.status
            USING ERRCODE = 'check_violation', CONSTRAINT = 'jobs_edge';
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER jobs_guard BEFORE UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_guard();

-- A hint for whoever waits; polling is the truth. Only status changes and wishes, never metrics: NOTIFY serialises commits.
CREATE FUNCTION jobs_notify() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'INSERT' OR NEW.status <> OLD.status OR NEW.wanted IS DISTINCT FROM OLD.wanted THEN
        PERFORM pg_notify('jobs', NEW.id);
    END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER jobs_notify AFTER INSERT OR UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION jobs_notify();
