//! Sends webhooks: takes messages that are due out of the database, signs them as Standard Webhooks are, posts them.
//!
//! Each receiver has one worker at a time, so a slow one delays its own messages only. A process that dies in the middle
//! leaves its messages to whoever comes after the lease: a message may come twice, with the same id, and none is lost.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::json;
use sha2::Sha256;
use tokio_util::sync::CancellationToken;
use ureq::Agent;

use crate::store::{Store, webhooks::Message};

/// Pause between looks for messages.
const LOOK: Duration = Duration::from_secs(1);
/// Longest that one delivery may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long messages are a sender's own: longer than it takes over a batch.
const LEASE: Duration = Duration::from_mins(2);
/// Seconds to the next try after each that failed; after the last the message is given up.
const AGAIN: [u64; 9] = [5, 60, 300, 1800, 7200, 18_000, 36_000, 72_000, 100_000];

/// Receivers with a worker.
type Busy = Arc<Mutex<HashSet<String>>>;

/// Sends until `stop` is cancelled. Deliveries under way end by themselves.
pub async fn run(store: Store, stop: CancellationToken) {
    let agent: Agent = Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_global(Some(PATIENCE))
        .user_agent(concat!("longhaul/", env!("CARGO_PKG_VERSION")))
        .build()
        .into();
    let busy = Busy::default();
    while stop.run_until_cancelled(tokio::time::sleep(LOOK)).await.is_some() {
        let taken: Vec<String> = busy.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect();
        match store.due_messages(&taken, LEASE).await {
            Ok(due) => deliver(&store, &agent, &busy, due),
            Err(error) => tracing::warn!(%error, "webhooks could not be looked through; it is tried again"),
        }
    }
}

/// Gives each receiver's messages to a worker.
fn deliver(store: &Store, agent: &Agent, busy: &Busy, mut due: Vec<Message>) {
    due.sort_by(|a, b| a.webhook.cmp(&b.webhook).then(a.created_at.cmp(&b.created_at)));
    for batch in due.chunk_by(|a, b| a.webhook == b.webhook) {
        let (store, agent, busy, batch) = (store.clone(), agent.clone(), busy.clone(), batch.to_vec());
        let Some(receiver) = batch.first().map(|message| message.webhook.to_string()) else { continue };
        busy.lock().unwrap_or_else(PoisonError::into_inner).insert(receiver.clone());
        tokio::spawn(async move {
            for message in batch {
                one(&store, &agent, message).await;
            }
            busy.lock().unwrap_or_else(PoisonError::into_inner).remove(&receiver);
        });
    }
}

/// One try, and the record of it.
async fn one(store: &Store, agent: &Agent, message: Message) {
    let (id, tries, agent) = (message.id.clone(), message.tries, agent.clone());
    let sent = tokio::task::spawn_blocking(move || post(&agent, &message)).await;
    let recorded = match sent.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(()) => store.message_delivered(&id).await,
        Err(why) => {
            let again = AGAIN.get(tries.saturating_sub(1) as usize).map(|seconds| Duration::from_secs(*seconds));
            tracing::warn!(message = id, tries, why, given_up = again.is_none(), "a webhook was not delivered");
            store.message_failed(&id, &why, again).await
        }
    };
    if let Err(error) = recorded {
        tracing::warn!(message = id, %error, "what became of a webhook was not recorded; it is sent again");
    }
}

fn post(agent: &Agent, message: &Message) -> Result<(), String> {
    let body = json!({
        "id": message.id, "object": "event", "created_at": message.created_at, "type": message.event,
        "data": {"id": message.job},
    })
    .to_string();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let signature = sign(&message.secret, &message.id, now, &body).ok_or("the secret cannot be read")?;
    let answer = agent
        .post(&message.url)
        .header("webhook-id", &message.id)
        .header("webhook-timestamp", now.to_string())
        .header("webhook-signature", signature)
        .content_type("application/json")
        .send(&body);
    match answer {
        Ok(answer) if answer.status().is_success() => Ok(()),
        Ok(answer) => Err(format!("answered with {}", answer.status())),
        Err(error) => Err(error.to_string()),
    }
}

/// `v1,<base64 of HMAC-SHA256 over id.timestamp.body>`; none where the secret is not one of ours.
pub fn sign(secret: &str, id: &str, timestamp: u64, body: &str) -> Option<String> {
    let key = STANDARD.decode(secret.strip_prefix("whsec_")?).ok()?;
    let mut mac = Hmac::<Sha256>::new_from_slice(&key).ok()?;
    mac.update(format!("{id}.{timestamp}.{body}").as_bytes());
    Some(format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes())))
}
