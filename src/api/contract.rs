//! What the contract says of the service as a whole: its head, and what every route asks of whoever calls.

use utoipa::{
    OpenApi,
    openapi::{
        self, Content, Ref, Response,
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};

use super::access::OPEN;

/// Name of the scheme by which keys are given.
const SCHEME: &str = "key";
const HOW: &str =
    "A key, as `longhaul keys create` prints it. Asked for as soon as one was made; before that, nobody needs one.";
/// Refusals that a route need not tell of itself.
const REFUSALS: [(&str, &str); 3] = [
    ("401", "no key, or one that does not hold (code `invalid_api_key`)"),
    ("403", "the key holds but may not do this (code `insufficient_permissions`)"),
    (
        "429",
        "a limit of the key (`rate_limit_exceeded`) or of the project (`insufficient_quota`, `rate_limit_exceeded`); \
         `retry-after` says when it will do, `x-should-retry: false` that asking again soon will not",
    ),
];

/// Head of the contract; paths and shapes come from the table.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Longhaul",
        description = "Fine-tunes language models on documents of millions of tokens, and hands the weights back. \
                       The OpenAI fine-tuning API, with extensions under `training`, `progress` and the downloads.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "files", description = "Training and validation documents."),
        (name = "uploads", description = "Large files in parts, and how to go on with one that broke off."),
        (name = "fine-tuning", description = "Jobs, their events and their checkpoints."),
        (name = "downloads", description = "The weights."),
        (name = "models", description = "What can be tuned, and what was."),
        (name = "webhooks", description = "Who is told of the end of jobs."),
        (name = "hub", description = "Fine-tuned models by name, for Hugging Face's clients: set HF_ENDPOINT to <this server>/hf."),
        (name = "service", description = "For load balancers.")
    )
)]
struct Contract;

/// The contract without its routes.
pub(super) fn head() -> openapi::OpenApi {
    Contract::openapi()
}

/// Writes into the contract of every route but the open ones that it wants a key.
pub(super) fn ask_for_keys(contract: &mut openapi::OpenApi) {
    let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(HOW)).build();
    let components = contract.components.get_or_insert_default();
    components.security_schemes.insert(SCHEME.into(), SecurityScheme::Http(scheme).into());
    contract.security = Some(vec![SecurityRequirement::new(SCHEME, [""; 0])]);
    for (path, item) in &mut contract.paths.paths {
        let operations = [&mut item.get, &mut item.post, &mut item.put, &mut item.patch, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            if OPEN.contains(&path.as_str()) {
                operation.security = Some(Vec::new());
                continue;
            }
            for (status, why) in REFUSALS {
                let mut response = Response::new(why);
                let envelope = Content::new(Some(Ref::from_schema_name("ErrorEnvelope")));
                response.content.insert("application/json".into(), envelope.into());
                operation.responses.responses.entry(status.into()).or_insert_with(|| response.into());
            }
        }
    }
}
