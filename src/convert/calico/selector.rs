//! Calico's selector expressions: `egress-code == 'red' && has(zone)`.

use std::collections::BTreeMap;

/// A parsed expression.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Selector {
    All,
    Not(Box<Selector>),
    And(Vec<Selector>),
    Or(Vec<Selector>),
    Has(String),
    /// The label has one of the values.
    In(String, Vec<String>),
    Contains(String, String),
    StartsWith(String, String),
    EndsWith(String, String),
}

impl Selector {
    /// Whether labels satisfy the expression. As in Calico, a missing label satisfies `!=` and `not in`.
    pub(super) fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        let value = |key: &String| labels.get(key).map(String::as_str);
        match self {
            Selector::All => true,
            Selector::Not(inner) => !inner.matches(labels),
            Selector::And(all) => all.iter().all(|part| part.matches(labels)),
            Selector::Or(any) => any.iter().any(|part| part.matches(labels)),
            Selector::Has(key) => labels.contains_key(key),
            Selector::In(key, values) => value(key).is_some_and(|v| values.iter().any(|known| known == v)),
            Selector::Contains(key, part) => value(key).is_some_and(|v| v.contains(part.as_str())),
            Selector::StartsWith(key, part) => value(key).is_some_and(|v| v.starts_with(part.as_str())),
            Selector::EndsWith(key, part) => value(key).is_some_and(|v| v.ends_with(part.as_str())),
        }
    }

    /// Parses an expression.
    ///
    /// # Errors
    /// What stands where something else should.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parser = Parser { rest: text.trim() };
        let selector = parser.any()?;
        match parser.rest {
            "" => Ok(selector),
            rest => Err(format!("{text:?} is not a selector of Calico's: {rest:?} is too much")),
        }
    }
}

struct Parser<'a> {
    rest: &'a str,
}

impl<'a> Parser<'a> {
    /// Takes a token, if it comes next.
    fn take(&mut self, token: &str) -> bool {
        let rest = self.rest.strip_prefix(token);
        self.rest = rest.map_or(self.rest, str::trim_start);
        rest.is_some()
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) { Ok(()) } else { Err(self.wrong(&format!("{token:?}"))) }
    }

    fn wrong(&self, wanted: &str) -> String {
        format!("{:?} is not {wanted}; write a selector like egress-code == 'red' && has(zone)", self.rest)
    }

    fn any(&mut self) -> Result<Selector, String> {
        let mut parts = vec![self.all()?];
        while self.take("||") {
            parts.push(self.all()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Selector::Or(parts) })
    }

    fn all(&mut self) -> Result<Selector, String> {
        let mut parts = vec![self.one()?];
        while self.take("&&") {
            parts.push(self.one()?);
        }
        Ok(if parts.len() == 1 { parts.remove(0) } else { Selector::And(parts) })
    }

    fn one(&mut self) -> Result<Selector, String> {
        if self.take("!") {
            return Ok(Selector::Not(Box::new(self.one()?)));
        }
        if self.take("(") {
            let inner = self.any()?;
            self.expect(")")?;
            return Ok(inner);
        }
        if self.take("all(") || self.take("global(") {
            self.expect(")")?;
            return Ok(Selector::All);
        }
        if self.take("has(") {
            let key = self.key()?;
            self.expect(")")?;
            return Ok(Selector::Has(key));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Selector, String> {
        let key = self.key()?;
        if self.take("==") {
            Ok(Selector::In(key, vec![self.text()?]))
        } else if self.take("!=") {
            Ok(Selector::Not(Box::new(Selector::In(key, vec![self.text()?]))))
        } else if self.take("not in") {
            Ok(Selector::Not(Box::new(Selector::In(key, self.texts()?))))
        } else if self.take("in") {
            Ok(Selector::In(key, self.texts()?))
        } else if self.take("contains") {
            Ok(Selector::Contains(key, self.text()?))
        } else if self.take("starts with") {
            Ok(Selector::StartsWith(key, self.text()?))
        } else if self.take("ends with") {
            Ok(Selector::EndsWith(key, self.text()?))
        } else {
            Err(self.wrong("an operator"))
        }
    }

    fn key(&mut self) -> Result<String, String> {
        let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "_./-".contains(c)));
        let (key, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
        if key.is_empty() {
            return Err(self.wrong("a label"));
        }
        self.rest = rest.trim_start();
        Ok(key.to_owned())
    }

    fn text(&mut self) -> Result<String, String> {
        let quote = self.rest.chars().next().filter(|c| matches!(c, '\'' | '"'));
        let inside = quote.and_then(|quote| self.rest[1..].split_once(quote));
        let Some((text, rest)) = inside else { return Err(self.wrong("a text in quotes")) };
        self.rest = rest.trim_start();
        Ok(text.to_owned())
    }

    fn texts(&mut self) -> Result<Vec<String>, String> {
        self.expect("{")?;
        let mut all = Vec::new();
        while !self.take("}") {
            all.push(self.text()?);
            if !self.take(",") {
                self.expect("}")?;
                break;
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_decide_as_in_calico() {
        let labels = BTreeMap::from([("egress-code", "red"), ("a.b/c", "x-y")].map(|(k, v)| (k.into(), v.into())));
        for (text, expected) in [
            ("egress-code == 'red'", true),
            ("egress-code == \"blue\"", false),
            ("egress-code != 'blue'", true),
            ("other != 'blue'", true),
            ("egress-code in {'blue', 'red'}", true),
            ("egress-code not in { 'blue' }", true),
            ("other not in {'a'}", true),
            ("has(a.b/c) && !has(other)", true),
            ("has(other) || (egress-code=='red' && a.b/c starts with 'x')", true),
            ("a.b/c contains '-' && a.b/c ends with 'z'", false),
            ("all()", true),
            ("!all()", false),
        ] {
            assert_eq!(Selector::parse(text).unwrap().matches(&labels), expected, "{text}");
        }
    }

    #[test]
    fn faults_are_reported_with_their_place() {
        for (text, words) in [
            ("egress-code = 'red'", "\"= 'red'\" is not an operator"),
            ("a == red", "a text in quotes"),
            ("has(a", "\")\""),
        ] {
            let error = Selector::parse(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
