//! Users, their roles, and the tokens by which they are known.
//!
//! Invariants: passwords and tokens are kept as hashes only; there is always an administrator who can
//! log in; who is disabled or gets another password is known by no token any more.

use crate::clock::{DAY_MS, HOUR_MS};
use crate::secret;
use crate::store::StoreError;
use crate::text::{Id, Name, words};
use rusqlite::{OptionalExtension, Row, Transaction, params};
use serde::Serialize;
use utoipa::ToSchema;

/// A log-in lasts so long.
pub const SESSION_MS: i64 = 12 * HOUR_MS;
/// A token for a program lasts so many days at most.
pub const MAX_TOKEN_DAYS: i64 = 365;
/// No user has more tokens that are valid.
const MAX_TOKENS: i64 = 50;

words! {
    /// What a user may do.
    UserRole {
        /// Everything.
        Admin = "admin",
        /// Everything but users, backups and the audit.
        Operator = "operator",
        /// Look.
        Viewer = "viewer",
    }
}

impl UserRole {
    /// Whether it includes another.
    pub fn includes(self, other: UserRole) -> bool {
        let rank = |role| match role {
            UserRole::Admin => 2,
            UserRole::Operator => 1,
            UserRole::Viewer => 0,
        };
        rank(self) >= rank(other)
    }
}

/// A user.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct User {
    #[serde(skip)]
    pub(crate) seq: i64,
    /// The id; it is in the certificates too.
    pub id: Id,
    /// The name to log in with.
    pub name: Name,
    /// What the user may do.
    pub role: UserRole,
    /// Whether the user may do nothing at all, for now.
    pub disabled: bool,
    /// Since when there is this user.
    pub created_at_ms: i64,
}

/// A token, without what is secret of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Token {
    #[serde(skip)]
    pub(crate) seq: i64,
    /// Its id.
    pub id: Id,
    /// Whose it is.
    pub user_id: Id,
    /// What it is for.
    pub name: String,
    /// Since when.
    pub created_at_ms: i64,
    /// Until when.
    pub expires_at_ms: i64,
}

fn user(row: &Row<'_>) -> rusqlite::Result<User> {
    Ok(User {
        seq: row.get("seq")?,
        id: row.get("id")?,
        name: row.get("name")?,
        role: row.get("role")?,
        disabled: row.get("disabled")?,
        created_at_ms: row.get("created_at_ms")?,
    })
}

fn token(row: &Row<'_>) -> rusqlite::Result<Token> {
    Ok(Token {
        seq: row.get("seq")?,
        id: row.get("id")?,
        user_id: row.get("user_id")?,
        name: row.get("name")?,
        created_at_ms: row.get("created_at_ms")?,
        expires_at_ms: row.get("expires_at_ms")?,
    })
}

/// Makes a user.
pub fn create(
    t: &Transaction<'_>,
    name: &Name,
    role: UserRole,
    password_hash: &str,
    now_ms: i64,
) -> Result<User, StoreError> {
    let id = Id::random();
    t.execute(
        "INSERT INTO users (id, name, role, password_hash, created_at_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5)",
        params![id, name, role, password_hash, now_ms],
    )?;
    get(t, id)
}

/// One user.
pub fn get(t: &Transaction<'_>, id: Id) -> Result<User, StoreError> {
    let mut statement = t.prepare("SELECT * FROM users WHERE id = ?1")?;
    let found = statement.query_row([id], user).optional()?;
    found.ok_or_else(|| StoreError::not_found("user", id))
}

/// Users after `after`, in the order in which they were made.
pub fn list(t: &Transaction<'_>, after: i64, limit: i64) -> Result<Vec<User>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM users WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
    let rows = statement.query_map([after, limit], user)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Who has this name, with what is kept of the password.
pub fn by_name(t: &Transaction<'_>, name: &Name) -> Result<Option<(User, String)>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM users WHERE name = ?1")?;
    let found = statement.query_row([name], |row| Ok((user(row)?, row.get("password_hash")?)));
    Ok(found.optional()?)
}

/// After a change of users: somebody must be left who can undo it.
fn check_admin_left(t: &Transaction<'_>) -> Result<(), StoreError> {
    let sql = "SELECT count(*) FROM users WHERE role = 'admin' AND disabled = 0";
    let admins: i64 = t.query_row(sql, [], |row| row.get(0))?;
    match admins {
        0 => Err(StoreError::conflict(
            "no administrator would be left: make another one first",
        )),
        _ => Ok(()),
    }
}

/// Changes what is given. Another password, or being disabled, ends all tokens.
pub fn update(
    t: &Transaction<'_>,
    id: Id,
    role: Option<UserRole>,
    disabled: Option<bool>,
    password_hash: Option<&str>,
) -> Result<User, StoreError> {
    get(t, id)?;
    t.execute(
        "UPDATE users SET role = coalesce(?2, role), disabled = coalesce(?3, disabled), \
         password_hash = coalesce(?4, password_hash) WHERE id = ?1",
        params![id, role, disabled, password_hash],
    )?;
    check_admin_left(t)?;
    if password_hash.is_some() || disabled == Some(true) {
        t.execute("DELETE FROM tokens WHERE user_id = ?1", [id])?;
    }
    get(t, id)
}

/// Removes a user, with all tokens.
pub fn delete(t: &Transaction<'_>, id: Id) -> Result<User, StoreError> {
    let user = get(t, id)?;
    t.execute("DELETE FROM users WHERE id = ?1", [id])?;
    check_admin_left(t)?;
    Ok(user)
}

/// Makes a token: what is kept, and the secret, which is kept nowhere.
pub fn create_token(
    t: &Transaction<'_>,
    user_id: Id,
    name: &str,
    lasts_ms: i64,
    now_ms: i64,
) -> Result<(Token, String), StoreError> {
    if !(1..=MAX_TOKEN_DAYS * DAY_MS).contains(&lasts_ms) {
        let why = format!("takes 1 to {MAX_TOKEN_DAYS}");
        return Err(StoreError::invalid("days", why));
    }
    t.execute("DELETE FROM tokens WHERE expires_at_ms <= ?1", [now_ms])?;
    let sql = "SELECT count(*) FROM tokens WHERE user_id = ?1";
    let count: i64 = t.query_row(sql, [user_id], |row| row.get(0))?;
    if count >= MAX_TOKENS {
        return Err(StoreError::conflict(format!(
            "this user has {MAX_TOKENS} valid tokens: log out, or delete some"
        )));
    }
    let secret = secret::token("jdt").map_err(|error| StoreError::conflict(error.to_string()))?;
    let id = Id::random();
    t.execute(
        "INSERT INTO tokens (id, user_id, name, hash, created_at_ms, expires_at_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            id,
            user_id,
            name,
            secret::sha256(secret.as_bytes()),
            now_ms,
            now_ms.saturating_add(lasts_ms)
        ],
    )?;
    let made = t.query_row("SELECT * FROM tokens WHERE id = ?1", [id], token)?;
    Ok((made, secret))
}

/// Tokens after `after`; of one user, or of all.
pub fn tokens(
    t: &Transaction<'_>,
    of: Option<Id>,
    after: i64,
    limit: i64,
) -> Result<Vec<Token>, StoreError> {
    let mut statement = t.prepare(
        "SELECT * FROM tokens WHERE seq > ?1 AND (?3 IS NULL OR user_id = ?3) \
         ORDER BY seq LIMIT ?2",
    )?;
    let rows = statement.query_map(params![after, limit, of], token)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Ends a token; of one user, or of anybody.
pub fn delete_token(t: &Transaction<'_>, id: Id, of: Option<Id>) -> Result<(), StoreError> {
    let deleted = t.execute(
        "DELETE FROM tokens WHERE id = ?1 AND (?2 IS NULL OR user_id = ?2)",
        params![id, of],
    )?;
    match deleted {
        0 => Err(StoreError::not_found("token", id)),
        _ => Ok(()),
    }
}

/// Who is known by a token, and the token's id. Nobody, if it is none, has expired, or its user is
/// disabled.
pub fn by_token(
    t: &Transaction<'_>,
    secret: &str,
    now_ms: i64,
) -> Result<Option<(User, Id)>, StoreError> {
    let hash = secret::sha256(secret.as_bytes());
    let mut statement = t.prepare(
        "SELECT users.*, tokens.id AS token_id FROM tokens JOIN users ON users.id = user_id \
         WHERE hash = ?1 AND expires_at_ms > ?2 AND disabled = 0",
    )?;
    let found = statement.query_row(params![hash, now_ms], |row| {
        Ok((user(row)?, row.get("token_id")?))
    });
    Ok(found.optional()?)
}

/// The user of a certificate; nobody, if there is none or they are disabled.
pub fn by_certificate(t: &Transaction<'_>, id: Id) -> Result<Option<User>, StoreError> {
    let mut statement = t.prepare("SELECT * FROM users WHERE id = ?1 AND disabled = 0")?;
    Ok(statement.query_row([id], user).optional()?)
}
