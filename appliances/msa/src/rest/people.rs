//! Routes of users, log-ins and tokens.
//!
//! Invariant: a password is checked only after the limiter let the try through, one at a time; a
//! refused log-in says the same whether the name or the password is wrong.

use super::extract::{Json, Listed, Part, Path, blocking, with_store};
use super::gate::{Caller, Who};
use super::problem::Problem;
use crate::certificates::{self, CertificateRole};
use crate::clock::DAY_MS;
use crate::service::Msa;
use crate::store::{Actor, Done};
use crate::text::{Id, Name, Password};
use crate::users::{self, Token, User, UserRole};
use axum::Extension;
use axum::extract::State;
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use utoipa::ToSchema;

/// What is sent to log in.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Login {
    /// The user's name.
    pub name: Name,
    /// The password.
    pub password: Password,
}

/// A token with its secret.
#[derive(Serialize, ToSchema)]
pub struct NewTokenAnswer {
    /// What to send as `Authorization: Bearer`. It is shown here and nowhere else.
    pub token: String,
    /// Its id.
    pub id: Id,
    /// What its holder may do.
    pub role: UserRole,
    /// Until when.
    pub expires_at_ms: i64,
}

/// Gives a token for a name and a password.
#[utoipa::path(post, path = "/login", operation_id = "login", tag = "people",
    request_body = Login, responses((status = 200, body = NewTokenAnswer)))]
pub async fn login(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(login): Json<Login>,
) -> Result<axum::Json<NewTokenAnswer>, Problem> {
    let answer = blocking(move || {
        let now_ms = msa.store.now_ms();
        let (name, address) = (login.name.as_str(), caller.address);
        msa.limiter
            .try_once(name, address, now_ms)
            .map_err(|wait_ms| {
                Problem::too_many("too many log-ins failed: wait, then try again", wait_ms)
            })?;
        let found = msa.store.read(|t| users::by_name(t, &login.name))?;
        let is_right = {
            let _turn = msa.password_turn.lock();
            let hash = found.as_ref().map(|(_, hash)| hash.as_str());
            msa.passwords.verify(&login.password, hash)
        };
        let user = found.map(|(user, _)| user).filter(|_| is_right);
        let user = user.filter(|user| !user.disabled).ok_or_else(|| {
            Problem::unauthorized("name or password is wrong, or the user is disabled")
        })?;
        msa.limiter.succeeded(name, address);
        let actor = Actor {
            name: format!("user:{}", user.name),
            address: Some(address),
        };
        let (token, secret) = msa.store.change(&actor, "log in", |t| {
            let lasts_ms = users::SESSION_MS;
            let made = users::create_token(t, user.id, "log-in", lasts_ms, now_ms)?;
            Ok(Done::new(made, format!("user {}", user.name)))
        })?;
        Ok(NewTokenAnswer {
            token: secret,
            id: token.id,
            role: user.role,
            expires_at_ms: token.expires_at_ms,
        })
    });
    Ok(axum::Json(answer.await?))
}

/// Ends the token that is shown.
#[utoipa::path(post, path = "/logout", operation_id = "logout", tag = "people",
    responses((status = 204)))]
pub async fn logout(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
) -> Result<StatusCode, Problem> {
    let Who::User(user, Some(token)) = caller.who.clone() else {
        return Err(Problem::new(
            StatusCode::CONFLICT,
            "there is no token to end: a certificate is ended by revoking it",
        ));
    };
    with_store(move || {
        msa.store.change(&caller.actor(), "log out", |t| {
            users::delete_token(t, token, Some(user.id))?;
            Ok(Done::new((), format!("user {}", user.name)))
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Who is known by what is shown.
#[utoipa::path(get, path = "/me", operation_id = "get_me", tag = "people",
    responses((status = 200, body = User)))]
pub async fn me(Extension(caller): Extension<Caller>) -> Result<axum::Json<User>, Problem> {
    Ok(axum::Json(caller.user()?.clone()))
}

/// What is sent to change one's own password.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PasswordChange {
    /// The password as it is.
    pub old: Password,
    /// As it is to be.
    pub new: Password,
}

/// Changes one's own password; ends all of one's tokens.
#[utoipa::path(put, path = "/me/password", operation_id = "change_password", tag = "people",
    request_body = PasswordChange, responses((status = 204)))]
pub async fn change_password(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(change): Json<PasswordChange>,
) -> Result<StatusCode, Problem> {
    let user = caller.user()?.clone();
    blocking(move || {
        let now_ms = msa.store.now_ms();
        let name = user.name.as_str();
        msa.limiter
            .try_once(name, caller.address, now_ms)
            .map_err(|wait_ms| Problem::too_many("too many tries failed: wait", wait_ms))?;
        let found = msa.store.read(|t| users::by_name(t, &user.name))?;
        let hash = {
            let _turn = msa.password_turn.lock();
            let old = found.as_ref().map(|(_, hash)| hash.as_str());
            if !msa.passwords.verify(&change.old, old) {
                return Err(Problem::forbidden("old: this is not the password"));
            }
            let hashed = msa.passwords.hash(&change.new);
            hashed.map_err(|error| Problem::internal(&error))?
        };
        msa.limiter.succeeded(name, caller.address);
        msa.store.change(&caller.actor(), "change password", |t| {
            users::update(t, user.id, None, None, Some(&hash))?;
            Ok(Done::new((), format!("user {}", user.name)))
        })?;
        Ok(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// One's own tokens; an administrator's answer has everybody's.
#[utoipa::path(get, path = "/tokens", operation_id = "list_tokens", tag = "people",
    params(Part), responses((status = 200, body = Listed<Token>)))]
pub async fn tokens(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    part: Part,
) -> Result<axum::Json<Listed<Token>>, Problem> {
    let of = if caller.is_admin() {
        None
    } else {
        Some(caller.user()?.id)
    };
    let items = with_store(move || {
        msa.store
            .read(|t| users::tokens(t, of, part.after, part.limit))
    });
    let listed = Listed::new(items.await?, part.limit, |token| token.seq);
    Ok(axum::Json(listed))
}

/// What is said to make a token for a program.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// What it is for.
    pub name: Name,
    /// For how many days.
    #[schema(minimum = 1, maximum = 365)]
    pub days: i64,
}

/// Makes a token that may do what its user may.
#[utoipa::path(post, path = "/tokens", operation_id = "create_token", tag = "people",
    request_body = NewToken, responses((status = 201, body = NewTokenAnswer)))]
pub async fn create_token(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(new): Json<NewToken>,
) -> Result<(StatusCode, axum::Json<NewTokenAnswer>), Problem> {
    let user = caller.user()?.clone();
    let answer = with_store(move || {
        let now_ms = msa.store.now_ms();
        let lasts_ms = new.days.saturating_mul(DAY_MS);
        let (token, secret) = msa.store.change(&caller.actor(), "create token", |t| {
            let made = users::create_token(t, user.id, new.name.as_str(), lasts_ms, now_ms)?;
            Ok(Done::new(made, format!("token {}", new.name)))
        })?;
        Ok(NewTokenAnswer {
            token: secret,
            id: token.id,
            role: user.role,
            expires_at_ms: token.expires_at_ms,
        })
    });
    Ok((StatusCode::CREATED, axum::Json(answer.await?)))
}

/// Ends a token of one's own; an administrator, anybody's.
#[utoipa::path(delete, path = "/tokens/{id}", operation_id = "delete_token", tag = "people",
    params(("id" = Id, Path)), responses((status = 204)))]
pub async fn delete_token(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
) -> Result<StatusCode, Problem> {
    let of = if caller.is_admin() {
        None
    } else {
        Some(caller.user()?.id)
    };
    with_store(move || {
        msa.store.change(&caller.actor(), "delete token", |t| {
            users::delete_token(t, id, of)?;
            Ok(Done::new((), format!("token {id}")))
        })
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What is said to make a user.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewUser {
    /// The name to log in with.
    pub name: Name,
    /// What the user may do.
    pub role: UserRole,
    /// The password.
    pub password: Password,
}

/// What may be changed of a user; what is not given stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UserChange {
    /// What the user may do.
    #[serde(default)]
    pub role: Option<UserRole>,
    /// Whether the user may do nothing, for now. Ends all of the user's tokens.
    #[serde(default)]
    pub disabled: Option<bool>,
    /// Another password. Ends all of the user's tokens.
    #[serde(default)]
    pub password: Option<Password>,
}

/// Users.
#[utoipa::path(get, path = "/users", operation_id = "list_users", tag = "people",
    params(Part), responses((status = 200, body = Listed<User>)))]
pub async fn users(
    State(msa): State<Arc<Msa>>,
    part: Part,
) -> Result<axum::Json<Listed<User>>, Problem> {
    let items = with_store(move || msa.store.read(|t| users::list(t, part.after, part.limit)));
    let listed = Listed::new(items.await?, part.limit, |user| user.seq);
    Ok(axum::Json(listed))
}

/// One user.
#[utoipa::path(get, path = "/users/{id}", operation_id = "get_user", tag = "people",
    params(("id" = Id, Path)), responses((status = 200, body = User)))]
pub async fn user(
    State(msa): State<Arc<Msa>>,
    Path(id): Path<Id>,
) -> Result<axum::Json<User>, Problem> {
    let found = with_store(move || msa.store.read(|t| users::get(t, id)));
    Ok(axum::Json(found.await?))
}

fn hash(msa: &Msa, password: &Password) -> Result<String, Problem> {
    let _turn = msa.password_turn.lock();
    let hashed = msa.passwords.hash(password);
    hashed.map_err(|error| Problem::internal(&error))
}

/// Makes a user.
#[utoipa::path(post, path = "/users", operation_id = "create_user", tag = "people",
    request_body = NewUser, responses((status = 201, body = User)))]
pub async fn create_user(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Json(new): Json<NewUser>,
) -> Result<(StatusCode, axum::Json<User>), Problem> {
    let made = blocking(move || {
        let hash = hash(&msa, &new.password)?;
        let now_ms = msa.store.now_ms();
        let made = msa.store.change(&caller.actor(), "create user", |t| {
            let user = users::create(t, &new.name, new.role, &hash, now_ms)?;
            let target = format!("user {}", user.name);
            Ok(Done::new(user, target).with_detail(new.role.word()))
        });
        Ok(made?)
    });
    Ok((StatusCode::CREATED, axum::Json(made.await?)))
}

/// Changes a user.
#[utoipa::path(patch, path = "/users/{id}", operation_id = "update_user", tag = "people",
    params(("id" = Id, Path)), request_body = UserChange,
    responses((status = 200, body = User)))]
pub async fn update_user(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
    Json(change): Json<UserChange>,
) -> Result<axum::Json<User>, Problem> {
    let changed = blocking(move || {
        let password = change.password.as_ref();
        let hash = password.map(|password| hash(&msa, password)).transpose()?;
        let changed = msa.store.change(&caller.actor(), "update user", |t| {
            let user = users::update(t, id, change.role, change.disabled, hash.as_deref())?;
            let mut what: Vec<String> = Vec::new();
            what.extend(change.role.map(|role| format!("role {role}")));
            what.extend(change.disabled.map(|off| format!("disabled {off}")));
            what.extend(hash.as_ref().map(|_| "another password".to_owned()));
            let target = format!("user {}", user.name);
            Ok(Done::new(user, target).with_detail(what.join(", ")))
        });
        Ok(changed?)
    });
    Ok(axum::Json(changed.await?))
}

/// Removes a user, with tokens and certificates.
#[utoipa::path(delete, path = "/users/{id}", operation_id = "delete_user", tag = "people",
    params(("id" = Id, Path)), responses((status = 204)))]
pub async fn delete_user(
    State(msa): State<Arc<Msa>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<Id>,
) -> Result<StatusCode, Problem> {
    blocking(move || {
        let now_ms = msa.store.now_ms();
        msa.store.change(&caller.actor(), "delete user", |t| {
            let gone = users::delete(t, id)?;
            certificates::revoke_all(t, CertificateRole::Operator, id, now_ms)?;
            Ok(Done::new((), format!("user {}", gone.name)))
        })?;
        msa.publish_revocations();
        Ok(())
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}
