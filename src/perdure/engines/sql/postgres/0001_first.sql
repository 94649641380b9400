-- The first schema. Tables of records are made from their layouts.
-- serves: 1

-- What is known of the store as a whole.
CREATE TABLE store (name text PRIMARY KEY, value text NOT NULL);

CREATE TABLE layouts (
    name text PRIMARY KEY, version bigint NOT NULL, shape text NOT NULL
);

-- One row an engine that is open for writing: the number of its last commit, by which it learns
-- what became of one whose answer was lost.
CREATE TABLE writers (
    id text PRIMARY KEY, number bigint NOT NULL, asked bigint NOT NULL, seen_s bigint NOT NULL
) WITH (fillfactor = 20);

-- A deleted record: only its version is kept, until no owner of it can be left.
CREATE TABLE tombstones (
    collection text COLLATE "C" NOT NULL, key text COLLATE "C" NOT NULL, version bigint NOT NULL,
    sum bigint NOT NULL, deleted_s bigint NOT NULL, PRIMARY KEY (collection, key)
);
CREATE INDEX tombstones_by_age ON tombstones (deleted_s);

-- Ids are taken by the thousand, so that a new stream costs no question.
CREATE SEQUENCE stream_ids INCREMENT BY 1000;
CREATE TABLE streams (
    id bigint PRIMARY KEY, log text COLLATE "C" NOT NULL, key text COLLATE "C" NOT NULL,
    incarnation bigint NOT NULL, first bigint NOT NULL, last bigint NOT NULL, sum bigint NOT NULL,
    dropped_s bigint, UNIQUE (log, key)
) WITH (fillfactor = 70);
CREATE INDEX streams_by_age ON streams (dropped_s) WHERE dropped_s IS NOT NULL;

-- The highest incarnation of a dropped stream that was forgotten since: new ones begin above it.
CREATE TABLE floors (log text PRIMARY KEY, incarnation bigint NOT NULL);

CREATE TABLE entries (
    stream bigint NOT NULL, incarnation bigint NOT NULL, seq bigint NOT NULL, sum bigint NOT NULL,
    value text COLLATE "C" NOT NULL, PRIMARY KEY (stream, incarnation, seq)
);
ALTER TABLE entries ALTER COLUMN value SET STORAGE EXTERNAL;

CREATE TABLE operations (
    id text COLLATE "C" NOT NULL, partition text COLLATE "C" NOT NULL, digest bigint NOT NULL,
    numbers text NOT NULL, sum bigint NOT NULL, committed_s bigint NOT NULL,
    PRIMARY KEY (id, partition)
);
CREATE INDEX operations_by_age ON operations (committed_s);
