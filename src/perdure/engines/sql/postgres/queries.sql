-- Named statements of the postgres engine. Those about tables of records are made from layouts.

-- name: settings
-- `mine`: it was said by this session, as it began or since
SELECT name, setting, source IN ('client', 'session') AS mine
FROM pg_settings WHERE name = ANY($1::text[])

-- name: pin
SELECT set_config('synchronous_commit', current_setting('synchronous_commit'), false)

-- name: take_time
SELECT set_config(name, '0', false) FROM unnest(ARRAY[
    'statement_timeout', 'lock_timeout', 'idle_in_transaction_session_timeout']) AS patient (name)
UNION ALL SELECT set_config('application_name', 'perdure at length', false)

-- name: end_stopped
-- The server ends a session that is idle in a transaction. It does not take one for idle whose
-- client has had a statement prepared and not gone on to execute it, so we do.
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
WHERE application_name = 'perdure' AND usename = current_user AND datname = current_database()
    AND xact_start IS NOT NULL AND wait_event = 'ClientRead'
    AND state_change < clock_timestamp() - make_interval(secs => $1)

-- name: schema_exists
SELECT EXISTS (SELECT 1 FROM pg_namespace WHERE nspname = $1)

-- name: columns
SELECT attname::text FROM pg_attribute
WHERE attrelid = to_regclass($1) AND attnum > 0 AND NOT attisdropped

-- name: lock
SELECT pg_advisory_xact_lock($1)

-- name: facts
SELECT name, value FROM store

-- name: set_fact
INSERT INTO store (name, value) VALUES ($1, $2)
ON CONFLICT (name) DO UPDATE SET value = excluded.value

-- name: forget_fact
DELETE FROM store WHERE name = $1

-- name: layouts
SELECT name, version, shape FROM layouts ORDER BY name

-- name: set_layout
INSERT INTO layouts (name, version, shape) VALUES ($1, $2, $3)
ON CONFLICT (name) DO UPDATE SET version = excluded.version, shape = excluded.shape

-- name: forget_writers
DELETE FROM writers WHERE id IN (
    SELECT id FROM writers WHERE seen_s < extract(epoch FROM clock_timestamp())::bigint - $1
    FOR UPDATE SKIP LOCKED)

-- name: set_writer
INSERT INTO writers (id, number, asked, seen_s)
VALUES ($1, $2, 0, extract(epoch FROM clock_timestamp())::bigint)
ON CONFLICT (id) DO UPDATE SET number = excluded.number, seen_s = excluded.seen_s

-- name: ask_writer
-- A write of its own: it waits for a commit that is still under way, and its own commit is durable
-- only when all before it are.
INSERT INTO writers (id, number, asked, seen_s)
VALUES ($1, 0, 1, extract(epoch FROM clock_timestamp())::bigint)
ON CONFLICT (id) DO UPDATE SET asked = writers.asked + 1, seen_s = excluded.seen_s
RETURNING number

-- name: forget_writer
DELETE FROM writers WHERE id = $1

-- name: tombstones_at
SELECT 1, $1::text, key, version, sum, 0, 0, 0, ''
FROM tombstones WHERE collection = $1 AND key = ANY($2::text[])

-- name: tips_at
SELECT 2, $1::text, key, id, incarnation, first, last, sum, ''
FROM streams WHERE log = $1 AND key = ANY($2::text[])

-- name: floor_at
SELECT 3, log, '', incarnation, 0, 0, 0, 0, '' FROM floors WHERE log = $1

-- name: operations_at
SELECT 4, id, partition, digest, sum, 0, 0, 0, numbers FROM operations WHERE id = ANY($1::text[])

-- name: shapes_at
SELECT 5, name, '', 0, 0, 0, 0, 0, shape FROM layouts WHERE name = ANY($1::text[])

-- name: shapes
SELECT name, shape FROM layouts WHERE name = ANY($1::text[])

-- name: bury
INSERT INTO tombstones (collection, key, version, sum, deleted_s)
SELECT collection, key, version, sum, extract(epoch FROM clock_timestamp())::bigint
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::bigint[])
    AS gone (collection, key, version, sum)
ON CONFLICT (collection, key) DO UPDATE SET
    version = excluded.version, sum = excluded.sum, deleted_s = excluded.deleted_s

-- name: unbury
DELETE FROM tombstones AS t USING unnest($1::text[], $2::text[]) AS back (collection, key)
WHERE t.collection = back.collection AND t.key = back.key

-- name: sweep_tombstones
DELETE FROM tombstones WHERE ctid = ANY (ARRAY (
    SELECT ctid FROM tombstones
    WHERE deleted_s < extract(epoch FROM clock_timestamp())::bigint - $1
    ORDER BY deleted_s LIMIT $2 FOR UPDATE SKIP LOCKED))

-- name: stream_ids
SELECT nextval('stream_ids')

-- name: set_tips
INSERT INTO streams (id, log, key, incarnation, first, last, sum, dropped_s)
SELECT id, log, key, incarnation, first, last, sum,
    CASE WHEN last = 0 THEN extract(epoch FROM clock_timestamp())::bigint END
FROM unnest($1::bigint[], $2::text[], $3::text[], $4::bigint[], $5::bigint[], $6::bigint[],
    $7::bigint[]) AS tip (id, log, key, incarnation, first, last, sum)
ON CONFLICT (id) DO UPDATE SET
    incarnation = excluded.incarnation, first = excluded.first, last = excluded.last,
    sum = excluded.sum, dropped_s = excluded.dropped_s

-- name: forget_entries
DELETE FROM entries AS e
USING unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[])
    AS gone (stream, incarnation, first, last)
WHERE e.stream = gone.stream AND e.incarnation = gone.incarnation
    AND e.seq BETWEEN gone.first AND gone.last

-- name: add_entries
INSERT INTO entries (stream, incarnation, seq, sum, value)
SELECT * FROM unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[])

-- name: dropped_streams
SELECT id, log, key, incarnation FROM streams
WHERE dropped_s < extract(epoch FROM clock_timestamp())::bigint - $1
ORDER BY dropped_s LIMIT $2

-- name: forget_streams
-- Only those that are as dropped as they were when they were looked for.
WITH gone AS (
    DELETE FROM streams AS s USING unnest($1::bigint[], $2::bigint[]) AS old (id, incarnation)
    WHERE s.id = old.id AND s.incarnation = old.incarnation AND s.last = 0
    RETURNING s.log, s.incarnation)
INSERT INTO floors (log, incarnation) SELECT log, max(incarnation) FROM gone GROUP BY log
ON CONFLICT (log) DO UPDATE SET incarnation = greatest(floors.incarnation, excluded.incarnation)

-- name: add_operations
INSERT INTO operations (id, partition, digest, numbers, sum, committed_s)
SELECT id, partition, digest, numbers, sum, extract(epoch FROM clock_timestamp())::bigint
FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::bigint[])
    AS done (id, partition, digest, numbers, sum)

-- name: remove_streams
DELETE FROM streams WHERE id = ANY($1::bigint[])

-- name: remove_operations
DELETE FROM operations AS o USING unnest($1::text[], $2::text[]) AS gone (id, partition)
WHERE o.id = gone.id AND o.partition = gone.partition

-- name: sweep_operations
DELETE FROM operations WHERE ctid = ANY (ARRAY (
    SELECT ctid FROM operations
    WHERE committed_s < extract(epoch FROM clock_timestamp())::bigint - $1
    ORDER BY committed_s LIMIT $2 FOR UPDATE SKIP LOCKED))

-- name: tip
-- One row, whether the stream is there or not.
SELECT s.incarnation, s.first, s.last, s.sum, f.incarnation AS floor
FROM (VALUES ($1::text)) AS asked (log)
LEFT JOIN streams AS s ON s.log = asked.log AND s.key = $2
LEFT JOIN floors AS f ON f.log = asked.log

-- name: tips_of
SELECT s.log, s.key, s.last
FROM unnest($1::text[], $2::text[]) AS asked (log, key)
JOIN streams AS s ON s.log = asked.log AND s.key = asked.key

-- name: read
-- One statement, so that tip and entries are of one moment. Numbers have no holes, so what is
-- wanted is one short range of them.
SELECT s.incarnation, s.first, s.last, s.sum, f.incarnation AS floor,
    e.seq, e.sum AS entry_sum, e.value
FROM (VALUES ($1::text)) AS asked (log)
LEFT JOIN streams AS s ON s.log = asked.log AND s.key = $2
LEFT JOIN floors AS f ON f.log = asked.log
LEFT JOIN entries AS e
    ON e.stream = s.id AND e.incarnation = s.incarnation AND e.seq BETWEEN $3 AND $4
ORDER BY e.seq

-- name: streams
SELECT key FROM streams WHERE log = $1 AND key > $2 AND key < $3 AND last >= first
ORDER BY key LIMIT $4

-- name: moment
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint

-- name: pass_stream_ids
SELECT setval('stream_ids', coalesce(max(id), 0) + $1) FROM streams

-- name: notify
SELECT pg_notify($1, $2)

-- name: sizes
SELECT c.relname::text, pg_total_relation_size(c.oid) FROM pg_class AS c
WHERE c.relnamespace = current_schema()::regnamespace AND c.relkind = 'r'

-- name: rows_about
SELECT coalesce(sum(greatest(reltuples, 0)), 0)::bigint FROM pg_class
WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r'

-- name: entries_by_log
SELECT log, sum(last - first + 1)::bigint FROM streams WHERE last >= first GROUP BY log

-- name: walk_streams
SELECT log, key FROM streams WHERE (log, key) > ($1, $2) ORDER BY log, key LIMIT $3

-- name: walk_entries
-- The stream and the next of its entries, one row at least; the first time also how many stand
-- outside its numbers.
SELECT s.incarnation, s.first, s.last, s.sum, e.seq, e.sum AS entry_sum, e.value,
    CASE WHEN $3 = 0 THEN (SELECT count(*) FROM entries AS o WHERE o.stream = s.id
        AND (o.incarnation <> s.incarnation OR o.seq < s.first OR o.seq > s.last)) END AS outside
FROM streams AS s LEFT JOIN entries AS e
    ON e.stream = s.id AND e.incarnation = s.incarnation
    AND e.seq > greatest($3, s.first - 1) AND e.seq <= greatest($3, s.first - 1) + $4
WHERE s.log = $1 AND s.key = $2 ORDER BY e.seq

-- name: walk_tombstones
SELECT collection, key, version, sum FROM tombstones
WHERE (collection, key) > ($1, $2) ORDER BY collection, key LIMIT $3

-- name: walk_operations
SELECT id, partition, digest, numbers, sum FROM operations
WHERE (id, partition) > ($1, $2) ORDER BY id, partition LIMIT $3

-- name: walk_strays
-- One row a stream that has entries, found by skipping from each to the next.
WITH RECURSIVE found AS (
    (SELECT stream FROM entries WHERE stream > $1 ORDER BY stream LIMIT 1)
    UNION ALL
    SELECT (SELECT e.stream FROM entries AS e WHERE e.stream > f.stream
            ORDER BY e.stream LIMIT 1)
    FROM found AS f WHERE f.stream IS NOT NULL)
SELECT f.stream, EXISTS (SELECT 1 FROM streams AS s WHERE s.id = f.stream)
FROM found AS f WHERE f.stream IS NOT NULL LIMIT $2

-- name: rows_of_tombstones
SELECT key, version, sum FROM tombstones
WHERE collection = $1 AND key >= $2 AND key < $3 ORDER BY key LIMIT $4

-- name: rows_of_streams
SELECT id, key, incarnation, first, last, sum FROM streams
WHERE log = $1 AND key >= $2 AND key < $3 ORDER BY key LIMIT $4

-- name: rows_of_entries
-- Those numbered above $3 up to $4, and no more bytes than $6 but for the first.
SELECT seq, sum, value FROM (
    SELECT *, sum(octet_length(value)) OVER (ORDER BY seq) - octet_length(value) AS before FROM (
        SELECT seq, sum, value FROM entries
        WHERE stream = $1 AND incarnation = $2 AND seq > $3 AND seq <= $4
        ORDER BY seq LIMIT $5) AS page) AS sized
WHERE before < $6 ORDER BY seq

-- name: next_tombstone
SELECT key FROM tombstones WHERE collection = $1 AND key >= $2 ORDER BY key LIMIT 1

-- name: next_stream
SELECT key FROM streams WHERE log = $1 AND key >= $2 ORDER BY key LIMIT 1

-- name: floors
SELECT log, incarnation FROM floors

-- name: raise_floors
INSERT INTO floors (log, incarnation) SELECT * FROM unnest($1::text[], $2::bigint[])
ON CONFLICT (log) DO UPDATE SET incarnation = greatest(floors.incarnation, excluded.incarnation)

-- name: present_tombstones
SELECT key, -version, sum FROM tombstones WHERE collection = $1 AND key = ANY($2::text[])

-- name: present_entries
-- The sums of the entries numbered $3 to $4 of each of some streams of a log, with their tips.
SELECT s.id, s.key, s.incarnation, s.first, s.last, s.sum, e.seq, e.sum AS entry_sum
FROM unnest($2::text[], $3::bigint[], $4::bigint[]) AS asked (key, low, high)
JOIN streams AS s ON s.log = $1 AND s.key = asked.key
LEFT JOIN entries AS e
    ON e.stream = s.id AND e.incarnation = s.incarnation AND e.seq BETWEEN asked.low AND asked.high

-- name: present_operations
SELECT id, partition, digest, numbers FROM operations WHERE id = ANY($1::text[])
