//! The storage policies' own interface, `/sdk/pbm/...`.

use super::methods::{needed, text};
use crate::refusal::Refusal;
use crate::world::World;
use serde_json::{Value, json};

fn profile_id(id: &str) -> Value {
    json!({"_typeName": "PbmProfileId", "uniqueId": id})
}

fn ids<'v>(arguments: &'v Value, name: &str) -> Result<Vec<&'v str>, Refusal> {
    let list = needed(arguments, name)?.as_array();
    let list = list.ok_or_else(|| Refusal::argument(name, format!("`{name}` is no list")))?;
    list.iter().map(|id| text(id, "uniqueId")).collect()
}

pub fn call(world: &World, method: &str, arguments: &Value) -> Result<Value, Refusal> {
    match method {
        "PbmCreate" => {
            let id = world.create_policy(needed(arguments, "createSpec")?)?;
            Ok(profile_id(&id))
        }
        "PbmQueryProfile" => {
            let all = world.policies();
            Ok(all.iter().map(|id| profile_id(id)).collect())
        }
        "PbmRetrieveContent" => {
            let read = |id: &str| {
                let (name, spec) = world.policy(id)?;
                Ok(json!({
                    "_typeName": "PbmCapabilityProfile", "profileId": profile_id(id), "name": name,
                    "resourceType": spec.get("resourceType"), "constraints": spec.get("constraints"),
                    "profileCategory": "REQUIREMENT", "generationId": 0,
                }))
            };
            ids(arguments, "profileIds")?
                .into_iter()
                .map(read)
                .collect()
        }
        "PbmQueryAssociatedProfile" => {
            let entity = needed(arguments, "entity")?;
            let of = world.policy_of(text(entity, "key")?)?;
            Ok(of.iter().map(|id| profile_id(id)).collect())
        }
        "PbmDelete" => {
            let delete = |id: &str| {
                let mut outcome = json!({
                    "_typeName": "PbmProfileOperationOutcome", "profileId": profile_id(id),
                });
                if let Err(refusal) = world.delete_policy(id) {
                    outcome["fault"] = refusal.document();
                }
                outcome
            };
            let all = ids(arguments, "profileId")?;
            Ok(all.into_iter().map(delete).collect())
        }
        method => {
            let words = format!("there is no policy method {method} here");
            Err(Refusal::new("MethodNotFound", words).with("method", json!(method)))
        }
    }
}
