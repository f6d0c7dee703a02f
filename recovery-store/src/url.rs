//! Where a container is: parsing of store locations, and the object store behind one.
//!
//! | Form | Store |
//! |---|---|
//! | `DIR`, `file:///DIR` | a local folder; every object is fsynced |
//! | `az://CONTAINER[/PREFIX]` | Azure Blob; account and key from options or `AZURE_STORAGE_*` |
//! | `azure+http://HOST:PORT/ACCOUNT/CONTAINER[/PREFIX]` | Azure's protocol at an own endpoint, without TLS: the Azurite emulator; `azure+https://` likewise with TLS |
//! | `s3://BUCKET[/PREFIX]` | S3; credentials from options or `AWS_*` |
//!
//! Options are `key=value`, the names of the `object_store` crate (`azure_storage_account_name`,
//! `aws_region`, ...) or the short ones `account`, `key`, `sas`, `endpoint`, `region`,
//! `access_key_id`, `secret_access_key`, `allow_http`. An option wins over the environment.
//!
//! Invariant: printing a location never prints a credential.

use crate::error::StoreError;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, RetryConfig};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// The account of every Azure emulator.
const EMULATOR_ACCOUNT: &str = "devstoreaccount1";
/// Its key, which is public and the same everywhere.
const EMULATOR_KEY: &str =
    "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// Which store a location names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// A folder.
    Local(PathBuf),
    /// Azure Blob.
    Azure {
        /// The blob container.
        container: String,
        /// Account and endpoint, where the location itself names them.
        endpoint: Option<AzureEndpoint>,
    },
    /// S3.
    S3 {
        /// The bucket.
        bucket: String,
    },
}

/// An endpoint of Azure's protocol that is not Azure's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AzureEndpoint {
    /// Such as `http://127.0.0.1:10000/devstoreaccount1`.
    pub url: String,
    /// The account.
    pub account: String,
}

/// A parsed store location with its options.
#[derive(Clone)]
pub struct StoreUrl {
    shown: String,
    kind: StoreKind,
    prefix: String,
    options: Vec<(String, String)>,
}

impl std::fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Options hold keys.
        f.debug_tuple("StoreUrl").field(&self.shown).finish()
    }
}

impl std::fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.shown)
    }
}

impl StoreUrl {
    /// Parses a location and its `(key, value)` options. Nothing is opened or created.
    pub fn parse(text: &str, options: &[(String, String)]) -> Result<Self, StoreError> {
        let (kind, prefix) = parse_kind(text)?;
        if prefix.split('/').any(|part| part == "." || part == "..") {
            return Err(wrong(text, "the prefix has a `.` or `..` component"));
        }
        Ok(Self {
            shown: text.to_owned(),
            kind,
            prefix: prefix.trim_matches('/').to_owned(),
            options: options.to_vec(),
        })
    }

    /// Parses `key=value`.
    pub fn parse_option(text: &str) -> Result<(String, String), StoreError> {
        match text.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
            _ => Err(StoreError::Url {
                // The text may be a credential: it is not repeated.
                url: "store option".into(),
                reason: "an option is written key=value".into(),
            }),
        }
    }

    /// Which store it is.
    pub fn kind(&self) -> &StoreKind {
        &self.kind
    }

    /// The folder, if the store is one.
    pub fn local_dir(&self) -> Option<&Path> {
        match &self.kind {
            StoreKind::Local(dir) => Some(dir),
            _ => None,
        }
    }

    /// Opens the store; `create` makes a missing local folder.
    pub(crate) fn open(
        &self,
        create: bool,
    ) -> Result<(Arc<dyn ObjectStore>, ObjectPath), StoreError> {
        let prefix = ObjectPath::parse(&self.prefix)
            .map_err(|error| wrong(&self.shown, &error.to_string()))?;
        let failed = |source| StoreError::Store {
            action: "open",
            object: "the store".into(),
            location: self.shown.clone(),
            source: Box::new(source),
        };
        let store: Arc<dyn ObjectStore> = match &self.kind {
            StoreKind::Local(dir) => {
                if create {
                    std::fs::create_dir_all(dir).map_err(|error| {
                        wrong(&self.shown, &format!("cannot create the folder: {error}"))
                    })?;
                } else if !dir.is_dir() {
                    return Err(wrong(&self.shown, "there is no such folder"));
                }
                let local = LocalFileSystem::new_with_prefix(dir).map_err(failed)?;
                // A part counts as uploaded once it is answered: so it must be on the disk by then.
                Arc::new(local.with_fsync(true).with_automatic_cleanup(true))
            }
            StoreKind::Azure {
                container,
                endpoint,
            } => Arc::new(
                self.azure(container, endpoint.as_ref())?
                    .build()
                    .map_err(failed)?,
            ),
            StoreKind::S3 { bucket } => Arc::new(self.s3(bucket)?.build().map_err(failed)?),
        };
        Ok((store, prefix))
    }

    fn azure(
        &self,
        container: &str,
        endpoint: Option<&AzureEndpoint>,
    ) -> Result<MicrosoftAzureBuilder, StoreError> {
        let mut builder = MicrosoftAzureBuilder::from_env()
            .with_retry(retry())
            .with_container_name(container);
        if let Some(endpoint) = endpoint {
            builder = builder
                .with_endpoint(endpoint.url.clone())
                .with_account(endpoint.account.clone())
                .with_allow_http(endpoint.url.starts_with("http://"));
            if endpoint.account == EMULATOR_ACCOUNT {
                builder = builder.with_access_key(EMULATOR_KEY);
            }
        }
        for (key, value) in &self.options {
            let name = match key.as_str() {
                "account" => "account_name",
                "key" => "account_key",
                "sas" => "sas_key",
                "endpoint" => "azure_storage_endpoint",
                other => other,
            };
            let name: AzureConfigKey = name
                .to_ascii_lowercase()
                .parse()
                .map_err(|_| wrong(&self.shown, &format!("unknown option {key:?} for Azure")))?;
            builder = builder.with_config(name, value);
        }
        Ok(builder)
    }

    fn s3(&self, bucket: &str) -> Result<AmazonS3Builder, StoreError> {
        let mut builder = AmazonS3Builder::from_env()
            .with_retry(retry())
            .with_bucket_name(bucket);
        for (key, value) in &self.options {
            let name = match key.as_str() {
                "key" => "access_key_id",
                "secret" => "secret_access_key",
                other => other,
            };
            let name: AmazonS3ConfigKey = name
                .to_ascii_lowercase()
                .parse()
                .map_err(|_| wrong(&self.shown, &format!("unknown option {key:?} for S3")))?;
            builder = builder.with_config(name, value);
        }
        Ok(builder)
    }
}

/// Short retries inside the client: the writer's own, which raise the alarm, come on top.
fn retry() -> RetryConfig {
    RetryConfig {
        max_retries: 3,
        retry_timeout: Duration::from_secs(20),
        ..RetryConfig::default()
    }
}

fn wrong(url: &str, reason: &str) -> StoreError {
    StoreError::Url {
        url: url.to_owned(),
        reason: reason.to_owned(),
    }
}

fn parse_kind(text: &str) -> Result<(StoreKind, String), StoreError> {
    if text.is_empty() {
        return Err(wrong(text, "it is empty"));
    }
    let Some((scheme, rest)) = text.split_once("://") else {
        return Ok((StoreKind::Local(PathBuf::from(text)), String::new()));
    };
    let split = |rest: &str| {
        let (head, tail) = rest.split_once('/').unwrap_or((rest, ""));
        (head.to_owned(), tail.to_owned())
    };
    match scheme {
        "file" => {
            if !rest.starts_with('/') {
                return Err(wrong(text, "a folder is written file:///absolute/path"));
            }
            Ok((StoreKind::Local(PathBuf::from(rest)), String::new()))
        }
        "az" => {
            let (container, prefix) = split(rest);
            check_name(text, "container", &container)?;
            let kind = StoreKind::Azure {
                container,
                endpoint: None,
            };
            Ok((kind, prefix))
        }
        "azure+http" | "azure+https" => {
            let (host, rest) = split(rest);
            let (account, rest) = split(&rest);
            let (container, prefix) = split(&rest);
            check_name(text, "host", host.split(':').next().unwrap_or_default())?;
            check_name(text, "account", &account)?;
            check_name(text, "container", &container)?;
            let protocol = scheme.trim_start_matches("azure+");
            let endpoint = AzureEndpoint {
                url: format!("{protocol}://{host}/{account}"),
                account,
            };
            let kind = StoreKind::Azure {
                container,
                endpoint: Some(endpoint),
            };
            Ok((kind, prefix))
        }
        "s3" => {
            let (bucket, prefix) = split(rest);
            check_name(text, "bucket", &bucket)?;
            Ok((StoreKind::S3 { bucket }, prefix))
        }
        other => Err(wrong(
            text,
            &format!(
                "unknown scheme {other:?}: use a folder, file://, az://, azure+http://, azure+https:// or s3://"
            ),
        )),
    }
}

fn check_name(url: &str, what: &str, name: &str) -> Result<(), StoreError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '$');
    if name.is_empty() || !name.chars().all(fits) {
        return Err(wrong(url, &format!("the {what} {name:?} is not a name")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(text: &str) -> StoreKind {
        StoreUrl::parse(text, &[]).expect("parses").kind
    }

    #[test]
    fn every_documented_form_parses() {
        assert_eq!(kind("a/b"), StoreKind::Local("a/b".into()));
        assert_eq!(kind("file:///a/b"), StoreKind::Local("/a/b".into()));
        let azure = StoreUrl::parse("az://box/some/prefix/", &[]).expect("parses");
        assert_eq!(azure.prefix, "some/prefix");
        let StoreKind::Azure {
            container,
            endpoint: Some(endpoint),
        } = kind("azure+http://127.0.0.1:10000/devstoreaccount1/box")
        else {
            panic!("an Azure location with an endpoint");
        };
        assert_eq!(container, "box");
        assert_eq!(endpoint.url, "http://127.0.0.1:10000/devstoreaccount1");
        assert_eq!(
            kind("s3://bucket/x"),
            StoreKind::S3 {
                bucket: "bucket".into()
            }
        );
        for bad in [
            "",
            "ftp://x/y",
            "az://",
            "s3:///x",
            "file://relative",
            "azure+http://h/account",
            "az://box/../up",
        ] {
            assert!(StoreUrl::parse(bad, &[]).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_location_never_prints_its_options() {
        let options = [("key".to_owned(), "c2VjcmV0".to_owned())];
        let url = StoreUrl::parse("az://box", &options).expect("parses");
        assert!(!format!("{url:?} {url}").contains("c2VjcmV0"));
        let error = StoreUrl::parse_option("c2VjcmV0").expect_err("no key");
        assert!(!error.to_string().contains("c2VjcmV0"));
    }

    #[test]
    fn an_unknown_option_is_named() {
        let options = [("colour".to_owned(), "red".to_owned())];
        for text in ["az://box", "s3://bucket"] {
            let url = StoreUrl::parse(text, &options).expect("parses");
            let error = url.open(false).map(|_| ()).expect_err("unknown option");
            assert!(error.to_string().contains("colour"), "{error}");
        }
    }

    #[test]
    fn no_text_makes_the_parser_panic() {
        bolero::check!().for_each(|bytes: &[u8]| {
            if let Ok(text) = std::str::from_utf8(bytes) {
                let _ = StoreUrl::parse(text, &[]);
                let _ = StoreUrl::parse_option(text);
            }
        });
    }
}
