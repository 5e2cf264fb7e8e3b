-- Whether an executor fetches base models that no host has from a hub, by name: it may then claim the inspection of a job that asks
-- for one.

ALTER TABLE hosts ADD COLUMN fetches boolean NOT NULL DEFAULT false;
