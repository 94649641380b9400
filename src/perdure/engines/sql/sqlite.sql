-- Named statements of the sqlite engine. Tables of records are generated from their layouts.

-- name: create
-- `commits` is made first: its root is page 2, where the post-mortem looks for stamps.
CREATE TABLE commits (id INTEGER PRIMARY KEY CHECK (id = 1), stamp BLOB NOT NULL) STRICT;
CREATE TABLE store (name TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE layouts (
    name TEXT PRIMARY KEY, version INTEGER NOT NULL, shape TEXT NOT NULL
) STRICT, WITHOUT ROWID;
-- A deleted record: only its version is kept, until no owner of it can be left.
CREATE TABLE tombstones (
    collection TEXT NOT NULL, key TEXT NOT NULL, version INTEGER NOT NULL,
    sum INTEGER NOT NULL, deleted_s INTEGER NOT NULL, PRIMARY KEY (collection, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX tombstones_by_age ON tombstones (deleted_s);
CREATE TABLE streams (
    id INTEGER PRIMARY KEY, log TEXT NOT NULL, key TEXT NOT NULL, incarnation INTEGER NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, sum INTEGER NOT NULL,
    dropped_s INTEGER, UNIQUE (log, key)
) STRICT;
CREATE INDEX streams_by_age ON streams (dropped_s) WHERE dropped_s IS NOT NULL;
-- id is the stream's id and the entry's number, so a stream is one range of this table.
CREATE TABLE entries (id INTEGER PRIMARY KEY, sum INTEGER NOT NULL, value BLOB NOT NULL) STRICT;
CREATE TABLE operations (
    id TEXT NOT NULL, partition TEXT NOT NULL, digest INTEGER NOT NULL, numbers BLOB NOT NULL,
    sum INTEGER NOT NULL, committed_s INTEGER NOT NULL, PRIMARY KEY (id, partition)
) STRICT, WITHOUT ROWID;
CREATE INDEX operations_by_age ON operations (committed_s);

-- name: stamp
SELECT stamp FROM commits WHERE id = 1

-- name: first_stamp
INSERT INTO commits (id, stamp) VALUES (1, ?)

-- name: next_stamp
UPDATE commits SET stamp = ? WHERE id = 1 AND stamp = ?

-- name: fact
SELECT value FROM store WHERE name = ?

-- name: set_fact
INSERT INTO store (name, value) VALUES (?, ?)
ON CONFLICT (name) DO UPDATE SET value = excluded.value

-- name: raise_fact
INSERT INTO store (name, value) VALUES (?, ?)
ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)

-- name: forget_fact
DELETE FROM store WHERE name = ?

-- name: layouts
SELECT name, version, shape FROM layouts

-- name: add_layout
INSERT INTO layouts (name, version, shape) VALUES (?, ?, ?)

-- name: tables
-- As they stand in a statement.
SELECT format('"%w"', name) FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'

-- name: trees
SELECT name, tbl_name FROM sqlite_schema WHERE rootpage > 0
UNION ALL SELECT 'sqlite_schema', 'sqlite_schema'

-- name: tree_bytes
SELECT sum(pgsize) FROM dbstat WHERE name = ? AND aggregate = TRUE

-- name: entries_by_log
SELECT log, sum(last - first + 1) FROM streams WHERE last >= first GROUP BY log

-- name: set_shape
UPDATE layouts SET shape = ? WHERE name = ?

-- name: has_tombstones
SELECT EXISTS (SELECT 1 FROM tombstones WHERE collection = ?)

-- name: tombstones_at
SELECT key, version, sum FROM tombstones WHERE collection = ? AND key IN carray(?)

-- name: bury
INSERT INTO tombstones (collection, key, version, sum, deleted_s) VALUES (?, ?, ?, ?, ?)
ON CONFLICT (collection, key) DO UPDATE SET
    version = excluded.version, sum = excluded.sum, deleted_s = excluded.deleted_s

-- name: unbury
DELETE FROM tombstones WHERE collection = ? AND key = ?

-- name: sweep_tombstones
DELETE FROM tombstones WHERE (collection, key) IN (
    SELECT collection, key FROM tombstones WHERE deleted_s < ? ORDER BY deleted_s LIMIT ?)

-- name: tip
SELECT incarnation, first, last, sum FROM streams WHERE log = ? AND key = ?

-- name: tips_at
SELECT id, key, incarnation, first, last, sum FROM streams WHERE log = ? AND key IN carray(?)

-- name: newest_stream
SELECT coalesce(max(id), 0) FROM streams

-- name: set_tip
INSERT INTO streams (id, log, key, incarnation, first, last, sum, dropped_s)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO UPDATE SET
    incarnation = excluded.incarnation, first = excluded.first, last = excluded.last,
    sum = excluded.sum, dropped_s = excluded.dropped_s

-- name: dropped_streams
SELECT id, log, incarnation FROM streams WHERE dropped_s < ? ORDER BY dropped_s LIMIT ?

-- name: forget_stream
DELETE FROM streams WHERE id = ?

-- name: streams
SELECT key FROM streams WHERE log = ? AND key > ? AND key < ? AND last >= first
ORDER BY key LIMIT ?

-- name: read
-- One statement, so that tip and entries are of one moment.
SELECT s.incarnation, s.first, s.last, s.sum, e.id & 0xffffffff, e.sum, e.value
FROM streams AS s LEFT JOIN entries AS e
    ON e.id > (s.id << 32) + :after AND e.id <= (s.id << 32) + s.last
WHERE s.log = :log AND s.key = :key ORDER BY e.id LIMIT :limit

-- name: add_entry
INSERT INTO entries (id, sum, value) VALUES (?, ?, ?)

-- name: forget_entries
DELETE FROM entries WHERE id BETWEEN ? AND ?

-- name: operations_at
SELECT id, partition, digest, numbers, sum FROM operations WHERE id IN carray(?)

-- name: add_operation
INSERT INTO operations (id, partition, digest, numbers, sum, committed_s)
VALUES (?, ?, ?, ?, ?, ?)

-- name: forget_operation
DELETE FROM operations WHERE id = ? AND partition = ?

-- name: sweep_operations
DELETE FROM operations WHERE (id, partition) IN (
    SELECT id, partition FROM operations WHERE committed_s < ? ORDER BY committed_s LIMIT ?)

-- name: stream
SELECT id, incarnation, first, last, sum FROM streams WHERE log = ? AND key = ?

-- name: entries_between
SELECT id, sum, value FROM entries WHERE id BETWEEN ? AND ? ORDER BY id

-- name: entries_outside
SELECT (SELECT count(*) FROM entries WHERE id > :low AND id < :first)
     + (SELECT count(*) FROM entries WHERE id > :last AND id <= :last + :span)

-- name: next_stream_of_entries
SELECT e.id >> 32, EXISTS (SELECT 1 FROM streams AS s WHERE s.id = e.id >> 32)
FROM entries AS e WHERE e.id >= ? ORDER BY e.id LIMIT 1

-- name: tombstone
SELECT version, sum FROM tombstones WHERE collection = ? AND key = ?

-- name: operation
SELECT digest, numbers, sum FROM operations WHERE id = ? AND partition = ?

-- name: operations_after
SELECT id, partition, digest, numbers, sum FROM operations
WHERE (id, partition) > (?, ?) ORDER BY id, partition
