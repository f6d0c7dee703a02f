//! The texts that come from outside: each kind with its length and its alphabet.
//!
//! Invariant: a value of one of these types keeps its rule, wherever it came from (a request, the
//! database, the command line): there is no other way to make one. So no text that could mean
//! something to SQL, to a path, to a terminal or to a web page travels further than the door.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSql, ToSqlOutput, ValueRef};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fmt;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, Type};
use uuid::Uuid;
pub use vcenter::BadText;

macro_rules! text_types {
    ($( $(#[$about:meta])* $name:ident: $min:literal to $max:literal, $rule:literal, $pattern:literal, $check:expr; )*) => { $(
        vcenter::text_type! {
            $(#[$about])*
            #[derive(Serialize, Deserialize)]
            #[serde(try_from = "String")]
            $name: $min to $max, $rule, $check
        }

        impl ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
                self.0.to_sql()
            }
        }

        impl FromSql for $name {
            fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
                let text = String::column_result(value)?;
                Self::try_from(text).map_err(FromSqlError::other)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let object = ObjectBuilder::new()
                    .schema_type(Type::String)
                    .min_length(Some($min))
                    .max_length(Some($max))
                    .pattern(Some($pattern))
                    .description(Some($rule));
                RefOr::T(Schema::Object(object.build()))
            }
        }

        impl utoipa::ToSchema for $name {
            fn name() -> Cow<'static, str> {
                stringify!($name).into()
            }
        }
    )* };
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || "._-".contains(c)
}

fn starts_and_ends_with_alphanumeric(text: &str) -> bool {
    let is = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    is(text.chars().next()) && is(text.chars().last())
}

fn is_label(label: &str) -> bool {
    label.len() <= 63
        && starts_and_ends_with_alphanumeric(label)
        && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

fn is_host(text: &str) -> bool {
    text.parse::<std::net::IpAddr>().is_ok() || text.split('.').all(is_label)
}

/// No part of a path climbs or hides, and nothing in it is for a shell.
fn is_plain_path(path: &str) -> bool {
    let part_is_plain = |part: &str| {
        !part.is_empty()
            && part != "."
            && part != ".."
            && part.chars().all(|c| is_word(c) || c == '+' || c == '=')
    };
    path.strip_prefix('/')
        .is_some_and(|rest| rest.split('/').all(part_is_plain))
}

fn is_store(text: &str) -> bool {
    let bucket = |rest: &str| {
        rest.split('/').all(|part| {
            !part.is_empty() && part != ".." && part != "." && part.chars().all(is_word)
        })
    };
    match text.split_once("://") {
        Some(("az" | "s3", rest)) => bucket(rest),
        Some(_) => false,
        None => is_plain_path(text),
    }
}

text_types! {
    /// A name that a person gives to something.
    Name: 1 to 64,
        "letters, digits, and . _ - between them",
        "^[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?$",
        |text| starts_and_ends_with_alphanumeric(text) && text.chars().all(is_word);
    /// The name of an execution.
    ExecutionName: 1 to 64,
        "letters and digits",
        "^[A-Za-z0-9]+$",
        |text| text.chars().all(|c| c.is_ascii_alphanumeric());
    /// A DNS name or an IP address.
    Address: 1 to 253,
        "a DNS name or an IP address",
        "^[A-Za-z0-9:]([A-Za-z0-9.:-]*[A-Za-z0-9:])?$",
        is_host;
    /// A kind of execution, like `enable-cluster`.
    KindName: 1 to 40,
        "lower-case letters, and hyphens between them",
        "^[a-z]([a-z-]*[a-z])?$",
        |text| starts_and_ends_with_alphanumeric(text)
            && text.chars().all(|c| c.is_ascii_lowercase() || c == '-');
    /// A user of a vCenter, like `jetdr@vsphere.local`.
    Account: 1 to 120,
        "letters, digits and . _ - @ \\",
        "^[A-Za-z0-9._@\\\\-]+$",
        |text| text.chars().all(|c| is_word(c) || "@\\".contains(c));
    /// A managed object's id in its vCenter, like `domain-c8`.
    Moid: 1 to 80,
        "letters, digits and hyphens",
        "^[A-Za-z0-9-]+$",
        |text| text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
    /// What vCenter calls something: people name virtual machines freely.
    Label: 1 to 80,
        "no control characters and none of \" ' ` < > \\ ;, no space at either end",
        "^[^\\x00-\\x1f\\x7f\"'`<>\\\\;]+$",
        |text| text.trim() == text && !text.chars().any(|c| c.is_control() || "\"'`<>\\;".contains(c));
    /// The path of a folder or device on an appliance.
    FilePath: 2 to 400,
        "an absolute path of letters, digits and . _ - + =, with no part . or ..",
        "^(/[A-Za-z0-9._+=-]+)+$",
        is_plain_path;
    /// Where containers go: `az://account/...`, `s3://bucket/...` or a folder.
    StoreUrl: 2 to 400,
        "az://..., s3://... or an absolute path; letters, digits and . _ - /",
        "^((az|s3)://[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*|(/[A-Za-z0-9._+=-]+)+)$",
        is_store;
    /// A version as its maker writes it, like `8.0.2` or `7.0.3-21930508`.
    VersionText: 1 to 40,
        "digits, letters and . -",
        "^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$",
        |text| starts_and_ends_with_alphanumeric(text)
            && text.chars().all(|c| c.is_ascii_alphanumeric() || ".-".contains(c));
    /// Why something is done, in a person's words.
    Reason: 1 to 200,
        "no control characters and none of \" ' ` < > \\",
        "^[^\\x00-\\x1f\\x7f\"'`<>\\\\]+$",
        |text| !text.chars().any(|c| c.is_control() || "\"'`<>\\".contains(c));
    /// The SHA-256 of a certificate, as 64 lower-case hexadecimal digits.
    Fingerprint: 64 to 64,
        "hexadecimal digits in lower case",
        "^[0-9a-f]{64}$",
        |text| text.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
    /// A certificate's serial number: hexadecimal digits in lower case, an even number of them.
    Serial: 2 to 40,
        "hexadecimal digits in lower case, an even number of them",
        "^([0-9a-f]{2})+$",
        |text| text.len().is_multiple_of(2)
            && text.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c));
}

/// A secret of another system, like the password of vCenter's user: no rule of ours applies to it. It is
/// never shown.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub struct Secret(String);

impl Secret {
    /// What it is.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Secret {
    type Error = BadText;

    fn try_from(text: String) -> Result<Self, BadText> {
        if (1..=256).contains(&text.chars().count()) && !text.chars().any(char::is_control) {
            return Ok(Self(text));
        }
        let rule = "1 to 256 characters, no control characters";
        Err(BadText::new("Secret", rule))
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl utoipa::PartialSchema for Secret {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1))
            .max_length(Some(256))
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Password)));
        RefOr::T(Schema::Object(object.build()))
    }
}

impl utoipa::ToSchema for Secret {
    fn name() -> Cow<'static, str> {
        "Secret".into()
    }
}

/// A password. It is never shown, and never leaves the process.
#[derive(Clone, Deserialize)]
#[serde(try_from = "String")]
pub struct Password(String);

impl Password {
    /// Its bytes, for hashing.
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl TryFrom<String> for Password {
    type Error = BadText;

    fn try_from(text: String) -> Result<Self, BadText> {
        if (12..=256).contains(&text.chars().count()) && !text.chars().any(char::is_control) {
            return Ok(Self(text));
        }
        let rule = "12 to 256 characters, no control characters";
        Err(BadText::new("Password", rule))
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Password(..)")
    }
}

impl utoipa::PartialSchema for Password {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(12))
            .max_length(Some(256))
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Password)));
        RefOr::T(Schema::Object(object.build()))
    }
}

impl utoipa::ToSchema for Password {
    fn name() -> Cow<'static, str> {
        "Password".into()
    }
}

/// An id: a UUID, kept as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Id(pub Uuid);

impl Id {
    /// A new one.
    pub fn random() -> Self {
        Self(Uuid::new_v4())
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_hyphenated().fmt(f)
    }
}

impl ToSql for Id {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(self.to_string().into())
    }
}

impl FromSql for Id {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        let text = value.as_str()?;
        Uuid::try_parse(text).map(Id).map_err(FromSqlError::other)
    }
}

impl utoipa::PartialSchema for Id {
    fn schema() -> RefOr<Schema> {
        let object = ObjectBuilder::new()
            .schema_type(Type::String)
            .format(Some(SchemaFormat::KnownFormat(KnownFormat::Uuid)));
        RefOr::T(Schema::Object(object.build()))
    }
}

impl utoipa::ToSchema for Id {
    fn name() -> Cow<'static, str> {
        "Id".into()
    }
}

/// Makes an enum whose values are words in the API and in the database.
macro_rules! words {
    ($( $(#[$about:meta])* $name:ident { $( $(#[$of:meta])* $value:ident = $word:literal, )* } )*) => { $(
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
        pub enum $name { $( $(#[$of])* #[serde(rename = $word)] $value, )* }

        impl $name {
            /// As it stands in the API and in the database.
            pub fn word(self) -> &'static str {
                match self { $( Self::$value => $word, )* }
            }
        }

        // By hand: the derive does not see what the words are called.
        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::Schema> {
                let object = utoipa::openapi::ObjectBuilder::new()
                    .schema_type(utoipa::openapi::schema::Type::String)
                    .enum_values(Some([$( $word ),*]));
                utoipa::openapi::RefOr::T(utoipa::openapi::Schema::Object(object.build()))
            }
        }

        impl utoipa::ToSchema for $name {
            fn name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.word())
            }
        }

        impl rusqlite::types::ToSql for $name {
            fn to_sql(&self) -> rusqlite::Result<rusqlite::types::ToSqlOutput<'_>> {
                Ok(self.word().into())
            }
        }

        impl rusqlite::types::FromSql for $name {
            fn column_result(
                value: rusqlite::types::ValueRef<'_>,
            ) -> rusqlite::types::FromSqlResult<Self> {
                match value.as_str()? {
                    $( $word => Ok(Self::$value), )*
                    _ => Err(rusqlite::types::FromSqlError::InvalidType),
                }
            }
        }
    )* };
}
pub(crate) use words;

impl From<&vcenter::Moid> for Moid {
    fn from(id: &vcenter::Moid) -> Self {
        Self(id.as_str().to_owned()) // the same rule, checked there
    }
}

impl From<&vcenter::VersionText> for VersionText {
    fn from(version: &vcenter::VersionText) -> Self {
        Self(version.as_str().to_owned()) // the same rule, checked there
    }
}

impl TryFrom<&Moid> for vcenter::Moid {
    type Error = BadText;

    fn try_from(id: &Moid) -> Result<Self, BadText> {
        id.as_str().parse()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// What somebody may try to slip in.
    pub const HOSTILE: &[&str] = &[
        "",
        " ",
        "'; DROP TABLE users; --",
        "x' OR '1'='1",
        "\" OR \"\"=\"",
        "../../etc/passwd",
        "/a/../b",
        "..",
        "a\0b",
        "a\nb",
        "\u{1b}[31m",
        "<script>alert(1)</script>",
        "`id`",
        "\\\\server\\share",
    ];

    #[test]
    fn hostile_texts_pass_no_door() {
        for text in HOSTILE {
            assert!(text.parse::<Name>().is_err(), "Name: {text:?}");
            assert!(
                text.parse::<ExecutionName>().is_err(),
                "ExecutionName: {text:?}"
            );
            assert!(text.parse::<Address>().is_err(), "Address: {text:?}");
            assert!(text.parse::<Moid>().is_err(), "Moid: {text:?}");
            assert!(text.parse::<FilePath>().is_err(), "FilePath: {text:?}");
            assert!(text.parse::<StoreUrl>().is_err(), "StoreUrl: {text:?}");
            assert!(text.parse::<VersionText>().is_err(), "{text:?}");
            assert!(
                text.parse::<Fingerprint>().is_err(),
                "Fingerprint: {text:?}"
            );
            assert!(text.parse::<Serial>().is_err(), "Serial: {text:?}");
        }
        for text in HOSTILE.iter().filter(|text| !text.contains("..")) {
            assert!(text.parse::<Label>().is_err(), "Label: {text:?}");
        }
    }

    #[test]
    fn lengths_are_counted_and_edges_pass() {
        assert!("a".repeat(64).parse::<Name>().is_ok());
        let said = "a".repeat(65).parse::<Name>().unwrap_err().to_string();
        assert_eq!(
            said,
            "Name takes 1 to 64 characters: letters, digits, and . _ - between them"
        );
        for good in ["10.1.2.3", "fe80::1", "esx-1.example.org", "localhost"] {
            assert!(good.parse::<Address>().is_ok(), "{good}");
        }
        for bad in ["-x.example", "a..b", "a_b", "10.1.2.3:443", "https://a"] {
            assert!(bad.parse::<Address>().is_err(), "{bad}");
        }
        for good in ["az://account/box", "s3://bucket", "/srv/dr-1"] {
            assert!(good.parse::<StoreUrl>().is_ok(), "{good}");
        }
        for bad in [
            "file:///x",
            "az://",
            "s3://a//b",
            "srv",
            "az://a/../b",
            "http://x",
        ] {
            assert!(bad.parse::<StoreUrl>().is_err(), "{bad}");
        }
        assert!("Web server 1 (test)".parse::<Label>().is_ok());
        assert!(" x".parse::<Label>().is_err());
        assert!(Password::try_from("short".to_owned()).is_err());
        let secret = Password::try_from("correct horse battery".to_owned()).unwrap();
        assert!(!format!("{secret:?}").contains("horse"));
    }
}
