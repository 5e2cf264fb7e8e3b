-- The numbers of a job that has ended, as a file. Written in the transaction that ends the job, so there is one, or none
-- where no step was done, and nobody sees the end without it.

ALTER TABLE jobs ADD COLUMN result_file text REFERENCES files ON DELETE SET NULL;
CREATE INDEX jobs_result ON jobs (result_file) WHERE result_file IS NOT NULL;
