//! Authorisation of metrics readers: the API server must know the bearer token and permit its user.

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How long an approval is cached. A user who loses the right keeps access for this time at most.
const ALLOWED_FOR: Duration = Duration::from_secs(60);
/// How long a rejection is cached. It is shorter, because the right may be granted at any time.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// How long an approval is used while the API server is away, when the metrics matter most.
const ALLOWED_OFFLINE_FOR: Duration = Duration::from_secs(600);
/// The most decisions that are cached; scrapers are few.
const MAX_CACHED: usize = 64;
/// The most reviews in progress at once.
const MAX_REVIEWS: usize = 4;
/// The longest token accepted, in bytes. A ServiceAccount's has about 1,000.
const MAX_TOKEN_BYTES: usize = 8192;

/// The decision about a request for the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// The user may read the metrics.
    Allowed,
    /// The token is missing or unknown.
    Unauthenticated,
    /// The token's user may not read the metrics; the reason, in words.
    Forbidden(String),
    /// The API server cannot decide now; the reason, in words.
    Unknown(String),
}

/// Asks the API server whether the bearer of a token may read the metrics.
pub type Review = Box<dyn Fn(String) -> Pin<Box<dyn Future<Output = Access> + Send>> + Send + Sync>;

/// Reviews tokens, and caches the decisions.
#[derive(Clone)]
pub struct Guard(Arc<Inner>);

struct Inner {
    review: Review,
    decisions: Mutex<HashMap<String, (Access, Instant)>>,
    reviews: Semaphore,
}

impl fmt::Debug for Guard {
    // Keep tokens out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

impl Guard {
    /// A guard whose decisions come from `review`.
    pub fn new(review: Review) -> Self {
        let reviews = Semaphore::new(MAX_REVIEWS);
        Guard(Arc::new(Inner { review, decisions: Mutex::default(), reviews }))
    }

    /// Whether a request with these headers may read the metrics.
    pub async fn access(&self, headers: &HeaderMap) -> Access {
        let Some(token) = bearer(headers) else { return Access::Unauthenticated };
        if let Some(access) = self.cached(token, ALLOWED_FOR) {
            return access;
        }
        let Ok(_permit) = self.0.reviews.acquire().await else { return Access::Unauthenticated };
        match (self.0.review)(token.to_owned()).await {
            Access::Unknown(why) => match self.cached(token, ALLOWED_OFFLINE_FOR) {
                Some(Access::Allowed) => Access::Allowed,
                _ => Access::Unknown(why),
            },
            access => {
                self.cache(token, access.clone());
                access
            }
        }
    }

    /// The cached decision, if it is still valid.
    fn cached(&self, token: &str, allowed_for: Duration) -> Option<Access> {
        let decisions = self.0.decisions.lock().unwrap_or_else(PoisonError::into_inner);
        let (access, at) = decisions.get(token)?;
        let life = if *access == Access::Allowed { allowed_for } else { REFUSED_FOR };
        (at.elapsed() < life).then(|| access.clone())
    }

    fn cache(&self, token: &str, access: Access) {
        let mut decisions = self.0.decisions.lock().unwrap_or_else(PoisonError::into_inner);
        decisions.retain(|_, (access, at)| {
            at.elapsed() < if *access == Access::Allowed { ALLOWED_OFFLINE_FOR } else { REFUSED_FOR }
        });
        // Many different tokens must not displace a cached approval.
        if decisions.len() >= MAX_CACHED {
            decisions.retain(|_, (access, _)| *access == Access::Allowed);
        }
        if decisions.len() < MAX_CACHED {
            decisions.insert(token.to_owned(), (access, Instant::now()));
        }
    }
}

/// The token of `Authorization: Bearer TOKEN`, RFC 6750 section 2.1.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= MAX_TOKEN_BYTES).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn with(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(value).unwrap())])
    }

    fn counted(decide: impl Fn(&str) -> Access + Send + Sync + 'static) -> (Guard, Arc<AtomicUsize>) {
        let reviews = Arc::new(AtomicUsize::new(0));
        let count = reviews.clone();
        let guard = Guard::new(Box::new(move |token| {
            count.fetch_add(1, Ordering::Relaxed);
            let access = decide(&token);
            Box::pin(async move { access })
        }));
        (guard, reviews)
    }

    #[tokio::test]
    async fn a_token_is_reviewed_once() {
        let refused = Access::Forbidden("no".into());
        let (guard, reviews) = counted({
            let refused = refused.clone();
            move |token| if token == "good" { Access::Allowed } else { refused.clone() }
        });
        for _ in 0..3 {
            assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
            assert_eq!(guard.access(&with("bearer  bad")).await, refused);
        }
        assert_eq!(reviews.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn anything_but_a_bearer_token_is_not_reviewed() {
        let (guard, reviews) = counted(|_| Access::Allowed);
        let long = format!("Bearer {}", "x".repeat(MAX_TOKEN_BYTES + 1));
        for value in ["Basic YTpi", "Bearer", "Bearer  ", &long] {
            assert_eq!(guard.access(&with(value)).await, Access::Unauthenticated, "{value}");
        }
        assert_eq!(guard.access(&HeaderMap::new()).await, Access::Unauthenticated);
        assert_eq!(reviews.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn many_tokens_displace_no_approval() {
        let (guard, reviews) = counted(|token| if token == "good" { Access::Allowed } else { Access::Unauthenticated });
        assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
        for n in 0..3 * MAX_CACHED {
            guard.access(&with(&format!("Bearer {n}"))).await;
        }
        let before = reviews.load(Ordering::Relaxed);
        assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
        assert_eq!(reviews.load(Ordering::Relaxed), before);
        assert!(guard.0.decisions.lock().unwrap().len() <= MAX_CACHED);
    }

    #[tokio::test]
    async fn an_approval_is_used_while_the_api_server_is_away_and_a_rejection_is_not() {
        let away = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let (guard, _) = counted({
            let away = away.clone();
            move |token| match token {
                _ if away.load(Ordering::Relaxed) => Access::Unknown("away".into()),
                "good" => Access::Allowed,
                _ => Access::Unauthenticated,
            }
        });
        guard.access(&with("Bearer good")).await;
        guard.access(&with("Bearer bad")).await;
        away.store(true, Ordering::Relaxed);
        // Make the cached decisions older than their lifetime.
        for (_, at) in guard.0.decisions.lock().unwrap().values_mut() {
            *at = at.checked_sub(ALLOWED_FOR).unwrap();
        }
        assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
        assert_eq!(guard.access(&with("Bearer bad")).await, Access::Unknown("away".into()));
    }
}
