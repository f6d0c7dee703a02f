//! What handlers take from a request, and how they get at the state.
//!
//! Invariant: what cannot be understood is answered with a problem document; nothing that blocks runs
//! on the threads that serve connections.

use super::problem::Problem;
use crate::store::StoreError;
use axum::extract::rejection::JsonRejection;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::StatusCode;
use axum::http::request::Parts;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// A body in JSON.
pub struct Json<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Self, Problem> {
        let read: Result<axum::Json<T>, JsonRejection> =
            axum::Json::from_request(request, state).await;
        match read {
            Ok(axum::Json(value)) => Ok(Self(value)),
            Err(rejection) => {
                let detail = format!("the body: {}", rejection.body_text());
                Err(Problem::new(rejection.status(), detail))
            }
        }
    }
}

/// A part of the path.
pub struct Path<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let read = axum::extract::Path::<T>::from_request_parts(parts, state).await;
        match read {
            Ok(axum::extract::Path(value)) => Ok(Self(value)),
            Err(rejection) => {
                let detail = format!("the path: {}", rejection.body_text());
                Err(Problem::new(StatusCode::BAD_REQUEST, detail))
            }
        }
    }
}

/// Which part of a list.
#[derive(Clone, Copy, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Part {
    /// What follows this place; an earlier answer's `next`.
    #[serde(default)]
    #[param(minimum = 0, default = 0)]
    pub after: i64,
    /// At most so many.
    #[serde(default = "default_limit")]
    #[param(minimum = 1, maximum = 200, default = 50)]
    pub limit: i64,
}

fn default_limit() -> i64 {
    50
}

impl<S: Send + Sync> FromRequestParts<S> for Part {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        let bad = |detail: String| Problem::new(StatusCode::BAD_REQUEST, detail);
        let read = axum::extract::Query::<Part>::from_request_parts(parts, state).await;
        let axum::extract::Query(part) =
            read.map_err(|rejection| bad(format!("the query: {}", rejection.body_text())))?;
        if part.after < 0 {
            return Err(bad("the query: after takes 0 or more".into()));
        }
        if !(1..=200).contains(&part.limit) {
            return Err(bad("the query: limit takes 1 to 200".into()));
        }
        Ok(part)
    }
}

/// A part of a list.
#[derive(Debug, Serialize, ToSchema)]
pub struct Listed<T> {
    /// What is there, in order.
    pub items: Vec<T>,
    /// If there may be more: what `after` is to be for them.
    pub next: Option<i64>,
}

impl<T> Listed<T> {
    /// A part of a list of which `limit` were asked for.
    pub fn new(items: Vec<T>, limit: i64, seq: impl Fn(&T) -> i64) -> Self {
        let is_full = items.len() as i64 >= limit;
        let next = items.last().map(seq).filter(|_| is_full);
        Self { items, next }
    }
}

/// Does what blocks (the state, passwords) where it may.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Problem> + Send + 'static,
) -> Result<T, Problem> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(error) => Err(Problem::internal(&error)),
    }
}

/// The same for the state.
pub async fn with_store<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, Problem> {
    blocking(move || Ok(work()?)).await
}
