//! Texts with a rule: how such a type is made, and those of a vCenter that travel on: ids and versions.
//!
//! Invariant: a value keeps its rule wherever it came from, so an id can stand in a path as it is.

/// What is wrong with a text: the rule that it breaks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} takes {rule}")]
pub struct BadText {
    what: &'static str,
    rule: String,
}

impl BadText {
    /// A text of the type `what` breaks its rule.
    pub fn new(what: &'static str, rule: impl Into<String>) -> Self {
        let rule = rule.into();
        Self { what, rule }
    }
}

/// Makes a type whose values are texts that keep a rule: how many characters, and a check in words and in
/// code. There is no other way to make a value than through that check.
#[macro_export]
macro_rules! text_type {
    ($(#[$about:meta])* $name:ident: $min:literal to $max:literal, $rule:literal, $check:expr) => {
        $(#[$about])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(String);

        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = $crate::BadText;

            fn try_from(text: String) -> Result<Self, $crate::BadText> {
                let check: fn(&str) -> bool = $check;
                let fits = (($min)..=($max)).contains(&text.chars().count());
                if fits && check(&text) {
                    return Ok(Self(text));
                }
                let rule = format!("{} to {} characters: {}", $min, $max, $rule);
                Err($crate::BadText::new(stringify!($name), rule))
            }
        }

        impl std::str::FromStr for $name {
            type Err = $crate::BadText;

            fn from_str(text: &str) -> Result<Self, $crate::BadText> {
                Self::try_from(text.to_owned())
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_type! {
    /// A managed object's id in its vCenter, like `domain-c8`.
    Moid: 1 to 80, "letters, digits and hyphens",
        |text| text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

text_type! {
    /// A version as its maker writes it, like `8.0.2`.
    VersionText: 1 to 40, "letters, digits and . -, a letter or digit at both ends",
        |text| {
            let is = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_alphanumeric());
            is(text.bytes().next()) && is(text.bytes().last())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-".contains(&b))
        }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_could_mean_something_to_a_path_is_no_id() {
        assert_eq!("domain-c8".parse::<Moid>().unwrap().as_str(), "domain-c8");
        for bad in ["", "../x", "a/b", "a b", "a?b", "a%2fb", &"a".repeat(81)] {
            assert!(bad.parse::<Moid>().is_err(), "{bad}");
        }
        for bad in ["", ".8", "8.", "8 0", "8/0"] {
            assert!(bad.parse::<VersionText>().is_err(), "{bad}");
        }
    }
}
