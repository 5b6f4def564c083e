//! Who may migrate into here: names of client certificates.

/// What to do with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Let it in.
    Allow,
    /// Turn it away.
    Deny,
}

/// How a rule's text is compared with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// It is the name.
    Exact,
    /// `*` stands for any characters, `?` for one.
    Glob,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    pattern: String,
    format: Format,
    policy: Policy,
}

/// Which sources may migrate into here, by the name in their certificate: as text with its
/// attributes in the certificate's order, such as `C=GB,O=Example,CN=host.example.org`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authorization {
    rules: Vec<Rule>,
    otherwise: Policy,
}

impl Authorization {
    /// Only these names (`authz-simple` with one of them).
    pub fn only<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Authorization {
        names.into_iter().fold(Authorization::otherwise(Policy::Deny), |all, name| {
            all.rule(name, Format::Exact, Policy::Allow)
        })
    }

    /// Without a rule that decides, this (`authz-list`).
    pub fn otherwise(policy: Policy) -> Authorization {
        Authorization { rules: Vec::new(), otherwise: policy }
    }

    /// And a rule for what no rule before it decides.
    #[must_use]
    pub fn rule(
        mut self,
        pattern: impl Into<String>,
        format: Format,
        policy: Policy,
    ) -> Authorization {
        self.rules.push(Rule { pattern: pattern.into(), format, policy });
        self
    }

    /// What is to be done with `name`.
    pub fn of(&self, name: &str) -> Policy {
        let matching = |rule: &&Rule| match rule.format {
            Format::Exact => rule.pattern == name,
            Format::Glob => glob(&rule.pattern, name),
        };
        self.rules.iter().find(matching).map_or(self.otherwise, |rule| rule.policy)
    }
}

/// In time that grows with the product of the lengths at most.
fn glob(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    // The last star, and how much it stands for.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&one) if one == '?' || one == text[t] => (p, t) = (p + 1, t + 1),
            _ => {
                let Some((at, covered)) = &mut star else { return false };
                *covered += 1;
                (p, t) = (*at + 1, *covered);
            }
        }
    }
    pattern[p..].iter().all(|&rest| rest == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_named_comes_in() {
        let two = Authorization::only(["CN=a", "CN=b"]);
        assert_eq!(two.of("CN=b"), Policy::Allow);
        for name in ["", "CN=", "CN=ab", "CN=A", "O=x,CN=a"] {
            assert_eq!(two.of(name), Policy::Deny, "{name}");
        }
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let list = Authorization::otherwise(Policy::Deny)
            .rule("O=Good,CN=bad*", Format::Glob, Policy::Deny)
            .rule("O=Good,CN=*", Format::Glob, Policy::Allow);
        assert_eq!(list.of("O=Good,CN=badger"), Policy::Deny);
        assert_eq!(list.of("O=Good,CN=fox"), Policy::Allow);
        assert_eq!(list.of("O=Other,CN=fox"), Policy::Deny);
    }

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("a*b*c", "a-b-b-c", true),
            ("a*b*c", "a-c-b", false),
            ("?", "ü", true),
            ("?", "", false),
            ("a?c*", "abc", true),
            ("*a", "aab", false),
            ("", "", true),
            ("", "a", false),
        ] {
            assert_eq!(glob(pattern, text), fits, "{pattern} {text}");
        }
        assert!(!glob(&"*a".repeat(2000), &"a".repeat(1999)), "and not in a lifetime");
    }
}
