-- Fair turns: the project that trains on the fewest devices is next, then the one whose last turn is longest ago.

ALTER TABLE jobs
    ADD COLUMN devices   int NOT NULL DEFAULT 1 CHECK (devices > 0),   -- that the last claim for training took
    ADD COLUMN turn_at   timestamptz;                                  -- when that was
CREATE INDEX jobs_turns ON jobs (project_id, turn_at);
CREATE INDEX jobs_running ON jobs (project_id) WHERE status = 'running';

-- Where a job stands among those of its project: by its priority, to which every hour of waiting adds one, so that nothing waits
-- for ever behind what comes later.
CREATE FUNCTION rank_in_queue(job jobs) RETURNS double precision LANGUAGE sql STABLE AS $$
    SELECT job.priority + extract(epoch FROM now() - job.created_at) / 3600
$$;
