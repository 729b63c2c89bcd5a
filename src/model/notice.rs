//! What a person should hear of at once: it becomes an event.

/// Something to be told of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whether somebody should act.
    pub is_warning: bool,
    /// One CamelCase word for programs.
    pub reason: String,
    /// What happened, and what to do.
    pub note: String,
}

impl Notice {
    /// Something to act on.
    pub fn warning(reason: &str, note: String) -> Self {
        Notice { is_warning: true, reason: reason.to_owned(), note }
    }

    /// Something to know of.
    pub fn normal(reason: &str, note: String) -> Self {
        Notice { is_warning: false, reason: reason.to_owned(), note }
    }
}
