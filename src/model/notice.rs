//! Notices to users about an object. They become Kubernetes events.

/// A notice about an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Whether a user should act on it.
    pub is_warning: bool,
    /// One CamelCase word for programs.
    pub reason: String,
    /// What happened, and what to do.
    pub note: String,
}

impl Notice {
    /// A notice that a user should act on.
    pub fn warning(reason: &str, note: String) -> Self {
        Notice { is_warning: true, reason: reason.to_owned(), note }
    }

    /// A notice for information.
    pub fn normal(reason: &str, note: String) -> Self {
        Notice { is_warning: false, reason: reason.to_owned(), note }
    }
}
