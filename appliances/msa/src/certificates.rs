//! Certificates and the one-time tokens by which they are first got.
//!
//! Invariants: a token gives a certificate to one key only, within its time; a lost answer can be asked
//! for again with the same key. A certificate is in the state before its holder has it, so that it can
//! be revoked. Whoever renews ends with two valid certificates at most: the one shown and the new one.

use crate::authority::{Authority, AuthorityError, Issued, Request, Revoked};
use crate::clock::{HOUR_MS, MINUTE_MS};
use crate::secret;
use crate::store::StoreError;
use crate::text::{Id, Reason, Serial, words};
use rusqlite::{OptionalExtension, Row, Transaction, params};
use rustls::pki_types::CertificateDer;
use serde::Serialize;
use tls::Identity;
use utoipa::ToSchema;

/// Minutes for which a token can be used, unless asked otherwise.
pub const TOKEN_MINUTES: i64 = 60;
/// At most.
pub const MAX_TOKEN_MINUTES: i64 = 24 * 60;
/// How long a token's answer can be asked for again with the same key.
const AGAIN_MS: i64 = HOUR_MS;

words! {
    /// Whom a certificate is for.
    CertificateRole {
        /// The management server.
        Msa = "msa",
        /// The daemon of a host.
        Host = "host",
        /// A DR appliance.
        Drva = "drva",
        /// A user.
        Operator = "operator",
    }
}

impl CertificateRole {
    /// As the certificate has it.
    pub fn role(self) -> tls::Role {
        match self {
            Self::Msa => tls::Role::Msa,
            Self::Host => tls::Role::Host,
            Self::Drva => tls::Role::Drva,
            Self::Operator => tls::Role::Operator,
        }
    }

    /// The other way round.
    pub fn of(role: tls::Role) -> Self {
        match role {
            tls::Role::Msa => Self::Msa,
            tls::Role::Host => Self::Host,
            tls::Role::Drva => Self::Drva,
            tls::Role::Operator => Self::Operator,
        }
    }

    /// The table of those who can have it, and what one of them is called.
    fn entities(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Msa => None,
            Self::Host => Some(("hosts", "host")),
            Self::Drva => Some(("drvas", "appliance")),
            Self::Operator => Some(("users", "user")),
        }
    }
}

/// Why somebody gets no certificate.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The token is none, used, expired, or another's.
    #[error(
        "the enrolment token is not valid: it is unknown, expired, or was used with another key; ask an operator for a new one"
    )]
    Token,
    /// The certificate that is to be renewed is not in force.
    #[error(
        "the certificate shown is not in force any more: it was revoked or is unknown; enrol anew"
    )]
    NotInForce,
    /// The state.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The authority.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
}

/// A certificate as the state has it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Certificate {
    #[serde(skip)]
    pub(crate) seq: i64,
    /// Its serial number.
    pub serial: Serial,
    /// Whom it is for.
    pub role: CertificateRole,
    /// Which of them.
    pub entity_id: Id,
    /// When it was issued.
    pub created_at_ms: i64,
    /// Until when it is valid.
    pub expires_at_ms: i64,
    /// Since when it is revoked.
    pub revoked_at_ms: Option<i64>,
    /// Why.
    pub reason: Option<String>,
}

fn certificate(row: &Row<'_>) -> rusqlite::Result<Certificate> {
    Ok(Certificate {
        seq: row.get("seq")?,
        serial: row.get("serial")?,
        role: row.get("role")?,
        entity_id: row.get("entity_id")?,
        created_at_ms: row.get("created_at_ms")?,
        expires_at_ms: row.get("expires_at_ms")?,
        revoked_at_ms: row.get("revoked_at_ms")?,
        reason: row.get("reason")?,
    })
}

/// Certificates after `after`, in the order in which they were issued.
pub fn list(t: &Transaction<'_>, after: i64, limit: i64) -> Result<Vec<Certificate>, StoreError> {
    let mut statement =
        t.prepare("SELECT * FROM certificates WHERE seq > ?1 ORDER BY seq LIMIT ?2")?;
    let rows = statement.query_map([after, limit], certificate)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

/// Keeps a certificate that was issued.
pub fn keep(t: &Transaction<'_>, issued: &Issued) -> Result<(), StoreError> {
    t.execute(
        "INSERT INTO certificates (serial, role, entity_id, key_hash, certificate, created_at_ms, \
         expires_at_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        params![
            issued.serial,
            CertificateRole::of(issued.identity.role),
            Id(issued.identity.id),
            issued.key_hash,
            issued.der.as_ref(),
            issued.created_at_ms,
            issued.expires_at_ms
        ],
    )?;
    Ok(())
}

/// Whether a certificate of this serial number is known, this holder's, and not revoked.
pub fn is_in_force(t: &Transaction<'_>, serial: &str, whose: Identity) -> Result<bool, StoreError> {
    let mut statement = t.prepare(
        "SELECT count(*) FROM certificates \
         WHERE serial = ?1 AND role = ?2 AND entity_id = ?3 AND revoked_at_ms IS NULL",
    )?;
    let role = CertificateRole::of(whose.role);
    let found: i64 = statement.query_row(params![serial, role, Id(whose.id)], |row| row.get(0))?;
    Ok(found == 1)
}

/// A token that gives a certificate, once.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Enrolment {
    /// Its id.
    pub id: Id,
    /// The token. It is shown here and nowhere else.
    pub token: String,
    /// Until when it can be used.
    pub expires_at_ms: i64,
}

/// Makes a token for a host, an appliance or a user that is there.
pub fn make_token(
    t: &Transaction<'_>,
    role: CertificateRole,
    entity_id: Id,
    minutes: i64,
    now_ms: i64,
) -> Result<Enrolment, EnrolError> {
    let Some((table, what)) = role.entities() else {
        let why = "the server's own certificate needs no token; use host, drva or operator";
        return Err(StoreError::invalid("role", why).into());
    };
    if !(1..=MAX_TOKEN_MINUTES).contains(&minutes) {
        let why = format!("takes 1 to {MAX_TOKEN_MINUTES}");
        return Err(StoreError::invalid("valid_minutes", why).into());
    }
    let sql = format!("SELECT count(*) FROM {table} WHERE id = ?1");
    let found: i64 = t
        .query_row(&sql, [entity_id], |row| row.get(0))
        .map_err(StoreError::from)?;
    if found == 0 {
        return Err(StoreError::not_found(what, entity_id).into());
    }
    let token = secret::token("jde").map_err(AuthorityError::from)?;
    let enrolment = Enrolment {
        id: Id::random(),
        expires_at_ms: now_ms + minutes * MINUTE_MS,
        token,
    };
    t.execute(
        "DELETE FROM enrolments WHERE expires_at_ms + ?2 < ?1",
        [now_ms, AGAIN_MS],
    )
    .map_err(StoreError::from)?;
    t.execute(
        "INSERT INTO enrolments (id, role, entity_id, hash, created_at_ms, expires_at_ms) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        params![
            enrolment.id,
            role,
            entity_id,
            secret::sha256(enrolment.token.as_bytes()),
            now_ms,
            enrolment.expires_at_ms
        ],
    )
    .map_err(StoreError::from)?;
    Ok(enrolment)
}

/// What a token leads to.
struct Known {
    id: Id,
    identity: Identity,
    expires_at_ms: i64,
    serial: Option<String>,
}

/// Gives a certificate for a token.
pub fn enrol(
    t: &Transaction<'_>,
    authority: &Authority,
    token: &str,
    request: &Request,
    now_ms: i64,
) -> Result<(Identity, CertificateDer<'static>), EnrolError> {
    let hash = secret::sha256(token.as_bytes());
    let known = t
        .query_row(
            "SELECT id, role, entity_id, expires_at_ms, serial FROM enrolments WHERE hash = ?1",
            [hash],
            |row| {
                let (role, entity): (CertificateRole, Id) = (row.get(1)?, row.get(2)?);
                Ok(Known {
                    id: row.get(0)?,
                    identity: Identity::new(role.role(), entity.0),
                    expires_at_ms: row.get(3)?,
                    serial: row.get(4)?,
                })
            },
        )
        .optional()
        .map_err(StoreError::from)?
        .ok_or(EnrolError::Token)?;
    if now_ms >= known.expires_at_ms {
        return Err(EnrolError::Token);
    }
    if let Some(serial) = known.serial {
        return again(t, &serial, &request.key_hash(), known.identity);
    }
    let issued = authority.issue(known.identity, request, now_ms)?;
    keep(t, &issued)?;
    t.execute(
        "UPDATE enrolments SET serial = ?2 WHERE id = ?1",
        params![known.id, issued.serial],
    )
    .map_err(StoreError::from)?;
    Ok((known.identity, issued.der))
}

/// The token was used: only the key that used it gets the same certificate, if it is still in force.
fn again(
    t: &Transaction<'_>,
    serial: &str,
    key_hash: &str,
    identity: Identity,
) -> Result<(Identity, CertificateDer<'static>), EnrolError> {
    let found: Option<Vec<u8>> = t
        .query_row(
            "SELECT certificate FROM certificates \
             WHERE serial = ?1 AND key_hash = ?2 AND revoked_at_ms IS NULL",
            [serial, key_hash],
            |row| row.get(0),
        )
        .optional()
        .map_err(StoreError::from)?;
    let found = found.ok_or(EnrolError::Token)?;
    Ok((identity, found.into()))
}

/// Gives a new certificate to the holder of one that is in force. The holder's others are revoked.
pub fn renew(
    t: &Transaction<'_>,
    authority: &Authority,
    whose: Identity,
    shown: &str,
    request: &Request,
    now_ms: i64,
) -> Result<CertificateDer<'static>, EnrolError> {
    if !is_in_force(t, shown, whose)? {
        return Err(EnrolError::NotInForce);
    }
    t.execute(
        "UPDATE certificates SET revoked_at_ms = ?4, reason = 'superseded' \
         WHERE role = ?1 AND entity_id = ?2 AND serial <> ?3 AND revoked_at_ms IS NULL \
         AND expires_at_ms > ?4",
        params![CertificateRole::of(whose.role), Id(whose.id), shown, now_ms],
    )
    .map_err(StoreError::from)?;
    let issued = authority.issue(whose, request, now_ms)?;
    keep(t, &issued)?;
    Ok(issued.der)
}

/// Takes a certificate back.
pub fn revoke(
    t: &Transaction<'_>,
    serial: &Serial,
    reason: &Reason,
    now_ms: i64,
) -> Result<Identity, StoreError> {
    let found: Option<(CertificateRole, Id, Option<i64>)> = t
        .query_row(
            "SELECT role, entity_id, revoked_at_ms FROM certificates WHERE serial = ?1",
            [serial],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )
        .optional()?;
    let (role, id, revoked) = found.ok_or_else(|| StoreError::not_found("certificate", serial))?;
    if revoked.is_some() {
        return Err(StoreError::conflict(format!(
            "certificate {serial} is revoked already: nothing is left to do"
        )));
    }
    t.execute(
        "UPDATE certificates SET revoked_at_ms = ?2, reason = ?3 WHERE serial = ?1",
        params![serial, now_ms, reason],
    )?;
    Ok(Identity::new(role.role(), id.0))
}

/// Takes all certificates of somebody back who is removed.
pub fn revoke_all(
    t: &Transaction<'_>,
    role: CertificateRole,
    entity_id: Id,
    now_ms: i64,
) -> Result<usize, StoreError> {
    let revoked = t.execute(
        "UPDATE certificates SET revoked_at_ms = ?3, reason = 'removed' \
         WHERE role = ?1 AND entity_id = ?2 AND revoked_at_ms IS NULL",
        params![role, entity_id, now_ms],
    )?;
    Ok(revoked)
}

/// Numbers and signs the list of what is revoked and has not expired.
pub fn revocation_list(
    t: &Transaction<'_>,
    authority: &Authority,
    now_ms: i64,
) -> Result<Vec<u8>, EnrolError> {
    let mut statement = t
        .prepare(
            "SELECT serial, revoked_at_ms FROM certificates \
             WHERE revoked_at_ms IS NOT NULL AND expires_at_ms > ?1 ORDER BY seq",
        )
        .map_err(StoreError::from)?;
    let rows = statement
        .query_map([now_ms], |row| Ok((row.get(0)?, row.get(1)?)))
        .map_err(StoreError::from)?;
    let rows: Vec<(String, i64)> = rows
        .collect::<rusqlite::Result<_>>()
        .map_err(StoreError::from)?;
    let revoked: Vec<Revoked> = rows
        .into_iter()
        .filter_map(|(serial, at_ms)| {
            let serial = secret::unhex(&serial)?;
            Some(Revoked { serial, at_ms })
        })
        .collect();
    let number: i64 = t
        .query_row(
            "INSERT INTO meta (key, value) VALUES ('revocation_list', '1') \
             ON CONFLICT (key) DO UPDATE SET value = CAST(value AS INTEGER) + 1 \
             RETURNING CAST(value AS INTEGER)",
            [],
            |row| row.get(0),
        )
        .map_err(StoreError::from)?;
    let number = u64::try_from(number).unwrap_or(1);
    Ok(authority.revocation_list(&revoked, number, now_ms)?)
}
