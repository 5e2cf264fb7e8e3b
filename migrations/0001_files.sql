-- Uploaded files: a row of facts, and the bytes in rows of 1 MiB.
--
-- Why rows: plain INSERTs of 1 MiB keep memory bounded, can be resumed, give Range reads by seq, and are as fast as COPY.
-- Why EXTERNAL: the default compresses every chunk with pglz, which makes text uploads six times slower.

CREATE TABLE blobs (
    id          text PRIMARY KEY,
    bytes       bigint NOT NULL DEFAULT 0 CHECK (bytes >= 0),
    sha256      text,                              -- lower-case hex, set together with complete
    complete    boolean NOT NULL DEFAULT false,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CHECK (complete = (sha256 IS NOT NULL))
);

CREATE TABLE blob_chunks (
    blob_id  text NOT NULL REFERENCES blobs ON DELETE CASCADE,
    seq      bigint NOT NULL,                      -- chunk seq holds bytes seq*1 MiB to (seq+1)*1 MiB, the last one what is left
    data     bytea NOT NULL CHECK (octet_length(data) BETWEEN 1 AND 1048576),
    PRIMARY KEY (blob_id, seq)
);
ALTER TABLE blob_chunks ALTER COLUMN data SET STORAGE EXTERNAL;

CREATE TABLE files (
    id              text PRIMARY KEY,
    seq             bigint GENERATED ALWAYS AS IDENTITY UNIQUE,  -- order of listing; created_at alone has ties
    filename        text NOT NULL,
    purpose         text NOT NULL,
    bytes           bigint NOT NULL,
    sha256          text NOT NULL,
    status          text NOT NULL DEFAULT 'uploaded' CHECK (status IN ('uploaded', 'processed', 'error')),
    status_details  text,
    blob_id         text NOT NULL UNIQUE REFERENCES blobs,
    created_at      timestamptz NOT NULL DEFAULT now(),
    expires_at      timestamptz
);
