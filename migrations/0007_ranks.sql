-- What the validation settled for jobs whose request leaves the length of a sequence open.
--
-- Executors choose the devices of a job by it before they start anything, and a job that goes on elsewhere, on other devices,
-- cuts its documents as before. NULL for jobs validated before this.

ALTER TABLE jobs ADD COLUMN sequence_length bigint CHECK (sequence_length > 0);
