//! Asks the API server whether the bearer of a token may read the metrics: a TokenReview tells the user, and a
//! SubjectAccessReview of `get` on `/metrics` tells the permission. controller-runtime asks the same.

use super::client::{Client, JSON, RequestFailure};
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

const TOKEN_REVIEWS: &str = "/apis/authentication.k8s.io/v1/tokenreviews";
const ACCESS_REVIEWS: &str = "/apis/authorization.k8s.io/v1/subjectaccessreviews";

/// The API server's answer about a token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenReview {
    /// The user may read the metrics.
    Allowed,
    /// The token is of no user.
    Unauthenticated,
    /// This user may not.
    Forbidden(String),
}

/// The reviewer of bearer tokens.
#[derive(Clone)]
pub struct Reviewer(pub(super) Client);

#[derive(Default, Deserialize)]
struct ReviewResponse {
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
    /// Whether the bearer of the token may read `/metrics`.
    ///
    /// # Errors
    /// The API server gives no answer.
    pub async fn may_read_metrics(&self, token: &str) -> Result<TokenReview, RequestFailure> {
        let review = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}});
        let reviewed = self.ask(TOKEN_REVIEWS, &review).await?;
        if !reviewed.authenticated {
            return Ok(TokenReview::Unauthenticated);
        }
        let user = reviewed.user;
        match self.ask(ACCESS_REVIEWS, &access_review(&user)).await?.allowed {
            true => Ok(TokenReview::Allowed),
            false => Ok(TokenReview::Forbidden(user["username"].as_str().unwrap_or_default().to_owned())),
        }
    }

    async fn ask(&self, path: &str, review: &Value) -> Result<Status, RequestFailure> {
        let content = (JSON, review.to_string().into_bytes());
        Ok(self.0.ask::<ReviewResponse>(Method::POST, path, Some(content)).await?.status)
    }
}

fn access_review(user: &Value) -> Value {
    json!({
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            // A TokenReview calls it `username`.
            "user": user["username"], "uid": user["uid"], "groups": user["groups"], "extra": user["extra"],
            "nonResourceAttributes": {"path": "/metrics", "verb": "get"},
        },
    })
}
