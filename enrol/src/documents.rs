//! What a part asks the management server for besides certificates: its own documents.
//!
//! Invariant: what the server says is durable before it counts: else a restart without the server would go
//! back to what was said before.

use crate::http::{Client, HttpError};
use crate::steps::EnrolError;
use serde_json::Value;
use std::path::Path;
use tls::Folder;

/// Asks for a document (`route` below `/api/v1`), and keeps it in a file if it is new. `parse` says what it
/// means; what it refuses is not kept. `None`: the server has none for this part.
pub fn fetch<T>(
    client: &Client,
    route: &str,
    file: &Path,
    parse: impl FnOnce(&Value) -> Result<T, EnrolError>,
) -> Result<Option<T>, EnrolError> {
    let document = match client.call("GET", route, None) {
        Err(HttpError::Refused { status: 404, .. }) => return Ok(None),
        answer => answer?,
    };
    keep(&document, file, parse).map(Some)
}

fn keep<T>(
    document: &Value,
    file: &Path,
    parse: impl FnOnce(&Value) -> Result<T, EnrolError>,
) -> Result<T, EnrolError> {
    let meant = parse(document)?;
    let text = document.to_string();
    if !std::fs::read(file).is_ok_and(|kept| kept == text.as_bytes()) {
        let folder = Folder::at(file.parent().unwrap_or(Path::new(".")));
        folder.write(file, text.as_bytes())?;
    }
    Ok(meant)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use serde_json::json;

    #[test]
    fn it_is_durable_before_it_counts_and_written_only_if_it_is_new() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("told.json");
        let number = |document: &Value| {
            let found = document.as_u64();
            found.ok_or_else(|| EnrolError::Misfit("no number".into()))
        };
        assert_eq!(keep(&json!(7), &file, number).unwrap(), 7);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "7");
        // Nonsense takes nothing away.
        assert!(keep(&json!("x"), &file, number).is_err());
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "7");
        let stamp = |file: &Path| file.metadata().unwrap().modified().unwrap();
        let before = stamp(&file);
        keep(&json!(7), &file, number).unwrap();
        assert_eq!(stamp(&file), before);
        keep(&json!(8), &file, number).unwrap();
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "8");
        // What cannot be kept does not count.
        let nowhere = dir.path().join("missing/told.json");
        assert!(keep(&json!(9), &nowhere, number).is_err());
    }
}
