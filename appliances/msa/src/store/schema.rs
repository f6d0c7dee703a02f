//! The tables, version by version.
//!
//! Invariant: a step that was released is never changed, only followed by another. What the state must
//! keep (references, states, names taken once) is said here, so that no code can break it.

/// Written into the database's header: a file of another program is not touched. "JDRM".
pub const APPLICATION_ID: i32 = 0x4a44_524d;

/// Each step leads from the version before it to its own: the first to 1.
pub const MIGRATIONS: &[&str] = &[FIRST, CLUSTERS, PROTECTION];

/// The version that this program reads and writes.
pub fn newest() -> usize {
    MIGRATIONS.len()
}

const FIRST: &str = r"
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE users (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    name          TEXT NOT NULL UNIQUE COLLATE NOCASE,
    role          TEXT NOT NULL CHECK (role IN ('admin', 'operator', 'viewer')),
    password_hash TEXT NOT NULL,
    disabled      INTEGER NOT NULL DEFAULT 0 CHECK (disabled IN (0, 1)),
    created_at_ms INTEGER NOT NULL
) STRICT;

-- Only the hash of a token is here: who reads the database cannot use it.
CREATE TABLE tokens (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    user_id       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name          TEXT NOT NULL,
    hash          TEXT NOT NULL UNIQUE CHECK (length(hash) = 64),
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL CHECK (expires_at_ms > created_at_ms)
) STRICT;
CREATE INDEX tokens_user ON tokens (user_id);

CREATE TABLE vcenters (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    name          TEXT NOT NULL UNIQUE COLLATE NOCASE,
    address       TEXT NOT NULL,
    port          INTEGER NOT NULL CHECK (port BETWEEN 1 AND 65535),
    fingerprint   TEXT CHECK (fingerprint IS NULL OR length(fingerprint) = 64),
    created_at_ms INTEGER NOT NULL,
    UNIQUE (address, port)
) STRICT;

CREATE TABLE clusters (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    vcenter_id    TEXT NOT NULL REFERENCES vcenters (id),
    moid          TEXT NOT NULL,
    name          TEXT NOT NULL,
    state         TEXT NOT NULL DEFAULT 'disabled'
                  CHECK (state IN ('disabled', 'enabling', 'enabled', 'disabling')),
    created_at_ms INTEGER NOT NULL,
    UNIQUE (vcenter_id, moid)
) STRICT;

CREATE TABLE drvas (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    name          TEXT NOT NULL UNIQUE COLLATE NOCASE,
    address       TEXT NOT NULL,
    port_base     INTEGER NOT NULL CHECK (port_base BETWEEN 1 AND 65530),
    created_at_ms INTEGER NOT NULL,
    UNIQUE (address, port_base)
) STRICT;

CREATE TABLE hosts (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    cluster_id    TEXT NOT NULL REFERENCES clusters (id),
    moid          TEXT NOT NULL,
    name          TEXT NOT NULL UNIQUE COLLATE NOCASE,
    version       TEXT,
    state         TEXT NOT NULL DEFAULT 'absent'
                  CHECK (state IN ('absent', 'installing', 'ready', 'failed', 'removing')),
    drva_id       TEXT REFERENCES drvas (id),
    created_at_ms INTEGER NOT NULL,
    UNIQUE (cluster_id, moid),
    UNIQUE (id, cluster_id)
) STRICT;
CREATE INDEX hosts_drva ON hosts (drva_id);

CREATE TABLE sites (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    name          TEXT NOT NULL UNIQUE COLLATE NOCASE,
    store         TEXT NOT NULL UNIQUE,
    created_at_ms INTEGER NOT NULL
) STRICT;

CREATE TABLE log_volumes (
    seq            INTEGER PRIMARY KEY AUTOINCREMENT,
    id             TEXT NOT NULL UNIQUE,
    drva_id        TEXT NOT NULL REFERENCES drvas (id),
    name           TEXT NOT NULL,
    path           TEXT NOT NULL,
    capacity_bytes INTEGER NOT NULL CHECK (capacity_bytes BETWEEN 67108864 AND 70368744177664),
    created_at_ms  INTEGER NOT NULL,
    UNIQUE (drva_id, name),
    UNIQUE (drva_id, path),
    UNIQUE (id, drva_id)
) STRICT;

-- One container of the site for each domain, named after it; its log lies on its own appliance.
CREATE TABLE domains (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    name          TEXT NOT NULL UNIQUE COLLATE NOCASE,
    site_id       TEXT NOT NULL REFERENCES sites (id),
    drva_id       TEXT NOT NULL REFERENCES drvas (id),
    log_volume_id TEXT NOT NULL,
    ack           TEXT NOT NULL CHECK (ack IN ('host', 'log')),
    created_at_ms INTEGER NOT NULL,
    FOREIGN KEY (log_volume_id, drva_id) REFERENCES log_volumes (id, drva_id)
) STRICT;
CREATE INDEX domains_site ON domains (site_id);
CREATE INDEX domains_drva ON domains (drva_id);

-- A machine without a domain is not protected; one with a domain is in some state of protection.
CREATE TABLE vms (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    cluster_id    TEXT NOT NULL REFERENCES clusters (id),
    host_id       TEXT,
    moid          TEXT NOT NULL,
    name          TEXT NOT NULL,
    uuid          TEXT NOT NULL UNIQUE,
    domain_id     TEXT REFERENCES domains (id),
    state         TEXT NOT NULL DEFAULT 'unprotected'
                  CHECK (state IN ('unprotected', 'initializing', 'initial_sync', 'recoverable',
                                   'degraded', 'error')),
    created_at_ms INTEGER NOT NULL,
    UNIQUE (cluster_id, moid),
    FOREIGN KEY (host_id, cluster_id) REFERENCES hosts (id, cluster_id),
    CHECK ((domain_id IS NULL) = (state = 'unprotected'))
) STRICT;
CREATE INDEX vms_domain ON vms (domain_id);
CREATE INDEX vms_host ON vms (host_id);

-- The id is that of a host, an appliance or a user; the column names no table, so triggers below
-- keep what a reference would.
CREATE TABLE enrolments (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    role          TEXT NOT NULL CHECK (role IN ('host', 'drva', 'operator')),
    entity_id     TEXT NOT NULL,
    hash          TEXT NOT NULL UNIQUE CHECK (length(hash) = 64),
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL CHECK (expires_at_ms > created_at_ms),
    serial        TEXT REFERENCES certificates (serial)
) STRICT;
CREATE INDEX enrolments_entity ON enrolments (entity_id);

CREATE TABLE certificates (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    serial        TEXT NOT NULL UNIQUE,
    role          TEXT NOT NULL CHECK (role IN ('msa', 'host', 'drva', 'operator')),
    entity_id     TEXT NOT NULL,
    key_hash      TEXT NOT NULL CHECK (length(key_hash) = 64),
    certificate   BLOB NOT NULL,
    created_at_ms INTEGER NOT NULL,
    expires_at_ms INTEGER NOT NULL CHECK (expires_at_ms > created_at_ms),
    revoked_at_ms INTEGER,
    reason        TEXT,
    CHECK ((revoked_at_ms IS NULL) = (reason IS NULL))
) STRICT;
CREATE INDEX certificates_entity ON certificates (entity_id);
-- A certificate stays revoked, and nobody forgets one.
CREATE TRIGGER certificates_stay_revoked BEFORE UPDATE OF revoked_at_ms ON certificates
WHEN old.revoked_at_ms IS NOT NULL BEGIN
    SELECT RAISE(ABORT, 'a revoked certificate stays revoked');
END;
CREATE TRIGGER certificates_stay BEFORE DELETE ON certificates BEGIN
    SELECT RAISE(ABORT, 'certificates are not deleted, they are revoked');
END;
CREATE TRIGGER hosts_gone AFTER DELETE ON hosts BEGIN
    DELETE FROM enrolments WHERE entity_id = old.id;
END;
CREATE TRIGGER drvas_gone AFTER DELETE ON drvas BEGIN
    DELETE FROM enrolments WHERE entity_id = old.id;
END;
CREATE TRIGGER users_gone AFTER DELETE ON users BEGIN
    DELETE FROM enrolments WHERE entity_id = old.id;
END;

CREATE TABLE executions (
    seq            INTEGER PRIMARY KEY AUTOINCREMENT,
    id             TEXT NOT NULL UNIQUE,
    name           TEXT NOT NULL UNIQUE COLLATE NOCASE,
    kind           TEXT NOT NULL,
    parameters     TEXT NOT NULL CHECK (json_valid(parameters)),
    state          TEXT NOT NULL DEFAULT 'queued'
                   CHECK (state IN ('queued', 'running', 'rolling_back', 'blocked', 'succeeded',
                                    'failed', 'cancelled', 'timed_out', 'abandoned')),
    -- Why it goes back, once it does: the state that it will end in.
    outcome        TEXT CHECK (outcome IN ('failed', 'cancelled', 'timed_out')),
    error          TEXT,
    created_by     TEXT NOT NULL,
    timeout_s      INTEGER NOT NULL CHECK (timeout_s BETWEEN 1 AND 604800),
    retention_days INTEGER NOT NULL CHECK (retention_days BETWEEN 1 AND 3650),
    created_at_ms  INTEGER NOT NULL,
    started_at_ms  INTEGER,
    ended_at_ms    INTEGER,
    cancel         INTEGER NOT NULL DEFAULT 0 CHECK (cancel IN (0, 1)),
    starts         INTEGER NOT NULL DEFAULT 0,
    CHECK ((ended_at_ms IS NOT NULL)
           = (state IN ('succeeded', 'failed', 'cancelled', 'timed_out', 'abandoned')))
) STRICT;
-- One at a time.
CREATE UNIQUE INDEX executions_one ON executions ((1))
    WHERE state IN ('running', 'rolling_back', 'blocked');

CREATE TABLE execution_steps (
    execution_id TEXT NOT NULL REFERENCES executions (id) ON DELETE CASCADE,
    step         INTEGER NOT NULL CHECK (step >= 0),
    name         TEXT NOT NULL,
    state        TEXT NOT NULL CHECK (state IN ('pending', 'begun', 'done', 'undone')),
    PRIMARY KEY (execution_id, step)
) STRICT, WITHOUT ROWID;

CREATE TABLE execution_lines (
    seq          INTEGER PRIMARY KEY AUTOINCREMENT,
    execution_id TEXT NOT NULL REFERENCES executions (id) ON DELETE CASCADE,
    at_ms        INTEGER NOT NULL,
    text         TEXT NOT NULL
) STRICT;
CREATE INDEX execution_lines_of ON execution_lines (execution_id, seq);

CREATE TABLE alarms (
    seq                INTEGER PRIMARY KEY AUTOINCREMENT,
    id                 TEXT NOT NULL UNIQUE,
    severity           TEXT NOT NULL CHECK (severity IN ('warning', 'critical')),
    kind               TEXT NOT NULL,
    subject            TEXT NOT NULL,
    text               TEXT NOT NULL,
    raised_at_ms       INTEGER NOT NULL,
    acknowledged_at_ms INTEGER,
    cleared_at_ms      INTEGER
) STRICT;
-- What is wrong is said once for as long as it is wrong.
CREATE UNIQUE INDEX alarms_open ON alarms (kind, subject) WHERE cleared_at_ms IS NULL;

CREATE TABLE events (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms   INTEGER NOT NULL,
    kind    TEXT NOT NULL,
    subject TEXT NOT NULL,
    text    TEXT NOT NULL
) STRICT;

CREATE TABLE audit (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    at_ms   INTEGER NOT NULL,
    actor   TEXT NOT NULL,
    address TEXT,
    action  TEXT NOT NULL,
    target  TEXT NOT NULL,
    outcome TEXT NOT NULL CHECK (outcome IN ('done', 'refused')),
    detail  TEXT NOT NULL
) STRICT;
CREATE TRIGGER audit_is_not_changed BEFORE UPDATE ON audit BEGIN
    SELECT RAISE(ABORT, 'the audit trail is only added to');
END;
CREATE TRIGGER audit_is_not_deleted BEFORE DELETE ON audit BEGIN
    SELECT RAISE(ABORT, 'the audit trail is only added to');
END;
";

/// What enabling and disabling clusters needs: packages, and what an execution must know after a restart.
const CLUSTERS: &str = r"
CREATE TABLE packages (
    seq           INTEGER PRIMARY KEY AUTOINCREMENT,
    id            TEXT NOT NULL UNIQUE,
    name          TEXT NOT NULL,
    vendor        TEXT NOT NULL,
    version       TEXT NOT NULL,
    file_name     TEXT NOT NULL,
    sha256        TEXT NOT NULL UNIQUE CHECK (length(sha256) = 64),
    length_bytes  INTEGER NOT NULL CHECK (length_bytes > 0),
    level         TEXT NOT NULL,
    -- Versions of the hypervisor that it is for: from the first, below the second.
    host_from     TEXT,
    host_below    TEXT,
    created_at_ms INTEGER NOT NULL,
    UNIQUE (vendor, name, version)
) STRICT;

ALTER TABLE clusters ADD COLUMN package_id TEXT REFERENCES packages (id);
ALTER TABLE hosts ADD COLUMN problem TEXT;
ALTER TABLE hosts ADD COLUMN component_version TEXT;

CREATE TABLE execution_notes (
    execution_id TEXT NOT NULL REFERENCES executions (id) ON DELETE CASCADE,
    key          TEXT NOT NULL,
    value        TEXT NOT NULL,
    PRIMARY KEY (execution_id, key)
) STRICT, WITHOUT ROWID;
";

/// What protecting machines needs: what vCenter and the appliances say of them.
const PROTECTION: &str = r"
ALTER TABLE vms ADD COLUMN reason TEXT;
ALTER TABLE vms ADD COLUMN state_since_ms INTEGER;
-- The newest moment of which a cut is known that holds the machine.
ALTER TABLE vms ADD COLUMN recoverable_at_ms INTEGER;
ALTER TABLE vms ADD COLUMN is_paused INTEGER NOT NULL DEFAULT 0 CHECK (is_paused IN (0, 1));
-- Its vCenter does not list it any more.
ALTER TABLE vms ADD COLUMN is_missing INTEGER NOT NULL DEFAULT 0 CHECK (is_missing IN (0, 1));
ALTER TABLE vms ADD COLUMN hardware TEXT CHECK (hardware IS NULL OR json_valid(hardware));
-- Whoever ends a protection ends what was known of it.
CREATE TRIGGER vms_unprotected AFTER UPDATE OF domain_id ON vms
WHEN new.domain_id IS NULL AND old.domain_id IS NOT NULL BEGIN
    UPDATE vms SET reason = NULL, recoverable_at_ms = NULL, is_paused = 0 WHERE id = new.id;
END;

-- Budgets of the filter; none: its own.
ALTER TABLE domains ADD COLUMN defer_budget_us INTEGER
    CHECK (defer_budget_us IS NULL OR defer_budget_us BETWEEN 0 AND 1000000);
ALTER TABLE domains ADD COLUMN ack_budget_us INTEGER
    CHECK (ack_budget_us IS NULL OR ack_budget_us BETWEEN 1000 AND 10000000);

-- What each appliance said last.
CREATE TABLE reports (
    drva_id  TEXT PRIMARY KEY REFERENCES drvas (id) ON DELETE CASCADE,
    at_ms    INTEGER NOT NULL,
    document TEXT NOT NULL CHECK (json_valid(document))
) STRICT, WITHOUT ROWID;
";
