//! Who may read the metrics, where that is asked: the bearer of a token that the API server knows and lets.

use hyper::HeaderMap;
use hyper::header::AUTHORIZATION;
use std::collections::HashMap;
use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// An answer is not asked for again so long: who loses the right loses it after that time at the latest.
const ALLOWED_FOR: Duration = Duration::from_secs(60);
/// The same of a refusal, which may be over as soon as somebody grants the right.
const REFUSED_FOR: Duration = Duration::from_secs(10);
/// While the API server is away, an earlier yes counts so long: metrics are what tells of such a time.
const ALLOWED_OFFLINE_FOR: Duration = Duration::from_secs(600);
/// As many answers are kept; scrapers are few.
const ANSWERS: usize = 64;
/// As many questions are under way at once, whoever knocks.
const QUESTIONS: usize = 4;
/// A longer token is none: a ServiceAccount's has about 1,000 bytes.
const LONGEST_TOKEN: usize = 8192;

/// What became of a request for the metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// It may be answered.
    Allowed,
    /// There is no token, or one that nobody knows.
    Unauthenticated,
    /// Whose token it is may not read the metrics; in words.
    Forbidden(String),
    /// It cannot be found out now; in words.
    Unknown(String),
}

/// Asks whether the bearer of a token may read the metrics.
pub type Review = Box<dyn Fn(String) -> Pin<Box<dyn Future<Output = Access> + Send>> + Send + Sync>;

/// Asks about tokens, and remembers the answers for a while.
#[derive(Clone)]
pub struct Guard(Arc<Inner>);

struct Inner {
    review: Review,
    answers: Mutex<HashMap<String, (Access, Instant)>>,
    questions: Semaphore,
}

impl fmt::Debug for Guard {
    // Tokens are nobody's to read.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

impl Guard {
    /// Whose answers come from `review`.
    pub fn new(review: Review) -> Self {
        let questions = Semaphore::new(QUESTIONS);
        Guard(Arc::new(Inner { review, answers: Mutex::default(), questions }))
    }

    /// Whether a request with these headers may read the metrics.
    pub async fn access(&self, headers: &HeaderMap) -> Access {
        let Some(token) = bearer(headers) else { return Access::Unauthenticated };
        if let Some(access) = self.remembered(token, ALLOWED_FOR) {
            return access;
        }
        let Ok(_permit) = self.0.questions.acquire().await else { return Access::Unauthenticated };
        match (self.0.review)(token.to_owned()).await {
            Access::Unknown(why) => match self.remembered(token, ALLOWED_OFFLINE_FOR) {
                Some(Access::Allowed) => Access::Allowed,
                _ => Access::Unknown(why),
            },
            access => {
                self.remember(token, access.clone());
                access
            }
        }
    }

    /// The last answer, if it is not too old.
    fn remembered(&self, token: &str, allowed_for: Duration) -> Option<Access> {
        let answers = self.0.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let (access, at) = answers.get(token)?;
        let life = if *access == Access::Allowed { allowed_for } else { REFUSED_FOR };
        (at.elapsed() < life).then(|| access.clone())
    }

    fn remember(&self, token: &str, access: Access) {
        let mut answers = self.0.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|_, (access, at)| {
            at.elapsed() < if *access == Access::Allowed { ALLOWED_OFFLINE_FOR } else { REFUSED_FOR }
        });
        // Whoever knocks with many tokens displaces no answer that somebody needs: an allowed one stays.
        if answers.len() >= ANSWERS {
            answers.retain(|_, (access, _)| *access == Access::Allowed);
        }
        if answers.len() < ANSWERS {
            answers.insert(token.to_owned(), (access, Instant::now()));
        }
    }
}

/// The token of `Authorization: Bearer TOKEN`, RFC 6750 section 2.1.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty() && token.len() <= LONGEST_TOKEN).then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn with(value: &str) -> HeaderMap {
        HeaderMap::from_iter([(AUTHORIZATION, HeaderValue::from_str(value).unwrap())])
    }

    fn counted(answers: impl Fn(&str) -> Access + Send + Sync + 'static) -> (Guard, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let guard = Guard::new(Box::new(move |token| {
            count.fetch_add(1, Ordering::Relaxed);
            let access = answers(&token);
            Box::pin(async move { access })
        }));
        (guard, asked)
    }

    #[tokio::test]
    async fn no_token_is_asked_about_twice_within_a_moment() {
        let refused = Access::Forbidden("no".into());
        let (guard, asked) = counted({
            let refused = refused.clone();
            move |token| if token == "good" { Access::Allowed } else { refused.clone() }
        });
        for _ in 0..3 {
            assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
            assert_eq!(guard.access(&with("bearer  bad")).await, refused);
        }
        assert_eq!(asked.load(Ordering::Relaxed), 2);
    }

    #[tokio::test]
    async fn what_is_no_bearer_token_is_not_asked_about() {
        let (guard, asked) = counted(|_| Access::Allowed);
        let long = format!("Bearer {}", "x".repeat(LONGEST_TOKEN + 1));
        for value in ["Basic YTpi", "Bearer", "Bearer  ", &long] {
            assert_eq!(guard.access(&with(value)).await, Access::Unauthenticated, "{value}");
        }
        assert_eq!(guard.access(&HeaderMap::new()).await, Access::Unauthenticated);
        assert_eq!(asked.load(Ordering::Relaxed), 0);
    }

    #[tokio::test]
    async fn many_tokens_displace_no_answer_that_somebody_needs() {
        let (guard, asked) = counted(|token| if token == "good" { Access::Allowed } else { Access::Unauthenticated });
        assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
        for n in 0..3 * ANSWERS {
            guard.access(&with(&format!("Bearer {n}"))).await;
        }
        let before = asked.load(Ordering::Relaxed);
        assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
        assert_eq!(asked.load(Ordering::Relaxed), before);
        assert!(guard.0.answers.lock().unwrap().len() <= ANSWERS);
    }

    #[tokio::test]
    async fn a_yes_outlives_the_api_servers_absence_and_a_no_does_not_become_one() {
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
        // As after their time.
        for (_, at) in guard.0.answers.lock().unwrap().values_mut() {
            *at = at.checked_sub(ALLOWED_FOR).unwrap();
        }
        assert_eq!(guard.access(&with("Bearer good")).await, Access::Allowed);
        assert_eq!(guard.access(&with("Bearer bad")).await, Access::Unknown("away".into()));
    }
}
