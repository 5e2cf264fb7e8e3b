-- Uploads in parts, and files that are made of them.
--
-- A file is an ordered list of blobs, so that completing an upload copies nothing, however large it is: its parts' blobs
-- become the file's. A file that came in one piece has one.

CREATE TABLE file_blobs (
    file_id  text NOT NULL REFERENCES files ON DELETE CASCADE,
    at       bigint NOT NULL CHECK (at >= 0),          -- where the blob's first byte stands in the file
    bytes    bigint NOT NULL CHECK (bytes > 0),
    blob_id  text NOT NULL UNIQUE REFERENCES blobs,
    PRIMARY KEY (file_id, at)
);
INSERT INTO file_blobs (file_id, at, bytes, blob_id) SELECT id, 0, bytes, blob_id FROM files;
ALTER TABLE files DROP COLUMN blob_id;

CREATE TABLE uploads (
    id           text PRIMARY KEY,
    seq          bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    filename     text NOT NULL,
    purpose      text NOT NULL,
    mime_type    text NOT NULL,
    bytes        bigint NOT NULL CHECK (bytes > 0),    -- of the whole, as promised
    file_life    double precision,                     -- seconds that the file is to live; NULL for ever
    status       text NOT NULL DEFAULT 'pending' CHECK (status IN ('pending', 'completed', 'cancelled', 'expired')),
    -- What it was completed with, by which a repeated request is known.
    part_ids     text[],
    file_id      text REFERENCES files ON DELETE SET NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    expires_at   timestamptz NOT NULL,                 -- moves on with every part
    CHECK ((status = 'completed') = (part_ids IS NOT NULL))
);
CREATE INDEX uploads_pending ON uploads (expires_at) WHERE status = 'pending';

-- Parts of pending uploads. Their rows go when the upload ends, whatever becomes of the bytes.
CREATE TABLE upload_parts (
    id          text PRIMARY KEY,
    seq         bigint GENERATED ALWAYS AS IDENTITY UNIQUE,
    upload_id   text NOT NULL REFERENCES uploads ON DELETE CASCADE,
    bytes       bigint NOT NULL CHECK (bytes > 0),
    sha256      text NOT NULL,
    blob_id     text NOT NULL UNIQUE REFERENCES blobs,
    created_at  timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX upload_parts_upload ON upload_parts (upload_id, seq);
