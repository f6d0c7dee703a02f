//! What a request is answered when it is refused: a problem document (RFC 9457).
//!
//! Invariant: it says what is wrong, where, and what to do; nothing of the server's inside is in it.

use crate::certificates::EnrolError;
use crate::store::StoreError;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// Longer details are cut: they may quote the request.
const MAX_DETAIL_CHARS: usize = 600;

/// Why a request was refused.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Problem {
    /// The kind of problem, as a URI; `about:blank` says that the status is all there is to it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What is wrong, where, and what to do.
    pub detail: String,
    /// The field that it is about.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    #[serde(skip)]
    retry_after_s: Option<i64>,
}

impl Problem {
    /// A problem.
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank".into(),
            title: status.canonical_reason().unwrap_or("problem").into(),
            status: status.as_u16(),
            detail: detail.into().chars().take(MAX_DETAIL_CHARS).collect(),
            field: None,
            retry_after_s: None,
        }
    }

    /// Nobody is known, or not as it must be.
    pub fn unauthorized(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, detail)
    }

    /// Known, and not allowed.
    pub fn forbidden(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, detail)
    }

    /// Too often.
    pub fn too_many(detail: impl Into<String>, wait_ms: i64) -> Self {
        let mut problem = Self::new(StatusCode::TOO_MANY_REQUESTS, detail);
        problem.retry_after_s = Some(wait_ms.max(0) / 1000 + 1);
        problem
    }

    /// The server's own fault; what it is goes to the log only.
    pub fn internal(error: &dyn std::fmt::Display) -> Self {
        tracing::error!("a request failed: {error}");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "the server failed; nothing was changed; its log says why",
        )
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        match &error {
            StoreError::NotFound { .. } => Self::new(StatusCode::NOT_FOUND, error.to_string()),
            StoreError::Conflict { .. } => Self::new(StatusCode::CONFLICT, error.to_string()),
            StoreError::Invalid { field, .. } => {
                let mut problem = Self::new(StatusCode::UNPROCESSABLE_ENTITY, error.to_string());
                problem.field = Some((*field).into());
                problem
            }
            _ => Self::internal(&error),
        }
    }
}

impl From<EnrolError> for Problem {
    fn from(error: EnrolError) -> Self {
        match error {
            EnrolError::Token | EnrolError::NotInForce => Self::unauthorized(error.to_string()),
            EnrolError::Store(error) => error.into(),
            EnrolError::Authority(error) => Self::internal(&error),
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        let json = HeaderValue::from_static("application/problem+json");
        headers.insert(header::CONTENT_TYPE, json);
        if self.status == 401 {
            let bearer = HeaderValue::from_static("Bearer");
            headers.insert(header::WWW_AUTHENTICATE, bearer);
        }
        if let Some(wait_s) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(wait_s));
        }
        // For the audit, which is written further out.
        response.extensions_mut().insert(self);
        response
    }
}
