-- One job on several hosts: the executor that leads it calls others for ranks, before it claims the job.
--
-- A call is open until `called_until`: the host that is asked takes it under a lease of its own, or it lapses and nothing has
-- happened. Once all are taken, the leader claims the job, and the calls carry its epoch: they hold exactly as long as that
-- claim. Each side renews, the leader the job's lease and the others theirs; whichever stops ends the attempt.

CREATE TABLE rank_calls (
    id            bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    job_id        text NOT NULL REFERENCES jobs ON DELETE CASCADE,
    leader        text NOT NULL,                -- executor that calls
    host          text NOT NULL,                -- executor that is asked
    part          jsonb NOT NULL,               -- domain::run::Part: which ranks, of what, with the secret by which they meet
    called_until  timestamptz NOT NULL,
    taken_until   timestamptz,                  -- lease of the host that is asked, once it has taken its ranks
    epoch         bigint,                       -- of the leader's claim
    ready         boolean NOT NULL DEFAULT false,  -- the host has all files of the job
    address       text,                         -- where rank 0 listens
    ended         jsonb,                        -- trainer::protocol::Report: how the host's ranks ended
    UNIQUE (job_id, host)
);

-- Places in `machines` of the devices that nobody trains on: what others may ask for.
ALTER TABLE hosts ADD COLUMN free jsonb NOT NULL DEFAULT '[]';
