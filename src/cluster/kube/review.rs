//! Whether the bearer of a token may read the metrics: who it is by a TokenReview, and whether it may by a
//! SubjectAccessReview of `get` on `/metrics`, as controller-runtime asks.

use super::client::{Client, Failure, JSON};
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

const TOKEN_REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
const ACCESS_REVIEWS: &str = "/apis/authorization.k8s.io/v1/subjectaccessreviews";

/// What the API server says of a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its bearer may.
    Allowed,
    /// It knows nobody with this token.
    Unauthenticated,
    /// Its bearer, named here, may not.
    Forbidden(String),
}

/// The reviewer.
#[derive(Clone)]
pub struct Reviewer(pub(super) Client);

#[derive(Default, Deserialize)]
struct Answer {
    #[serde(default)]
    status: Status,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Status {
    authenticated: bool,
    user: Value,
    allowed: bool,
}

impl Reviewer {
    /// Whether who has the token may read `/metrics`.
    ///
    /// # Errors
    /// The API server does not say.
    pub async fn may_read_metrics(&self, token: &str) -> Result<Verdict, Failure> {
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
        let told = self.ask(TOKEN_REVIEWS, &review).await?;
        if !told.authenticated {
            return Ok(Verdict::Unauthenticated);
        }
        let told = self.ask(ACCESS_REVIEWS, &access_review(&told.user)).await.map(|s| (s.allowed, told.user))?;
        match told {
            (true, _) => Ok(Verdict::Allowed),
            (false, user) => Ok(Verdict::Forbidden(user["username"].as_str().unwrap_or_default().to_owned())),
        }
    }

    async fn ask(&self, path: &str, review: &Value) -> Result<Status, Failure> {
        let content = (JSON, review.to_string().into_bytes());
        Ok(self.0.ask::<Answer>(Method::POST, path, Some(content)).await?.status)
    }
}

fn access_review(user: &Value) -> Value {
    json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            // Named `user` here and `username` there.
            "user": user["username"], "uid": user["uid"], "groups": user["groups"], "extra": user["extra"],
            "nonResourceAttributes": {"path": "/metrics", "verb": "get"},
        },
    })
}
