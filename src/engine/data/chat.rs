//! A conversation as text, and which of it is trained: what the assistant says in turns that have a weight.
//!
//! A template that marks what the assistant generates says where that is. Of others it is found by rendering the conversation
//! up to a turn, with the prompt that asks for one, and up to its end: what the second has beyond the first is the turn,
//! provided that both are beginnings of the whole. Where a template rewrites earlier turns they are not, and then nothing is
//! guessed.

use super::{
    examples::Chat,
    template::{Marked, Template},
};

/// Renders a conversation and marks the trained turns. A complaint is the rest of a sentence that names the line.
pub(super) fn mark(chat: &Chat, template: &Template) -> Result<Marked, String> {
    let whole = template.render(chat, chat.messages.len(), false)?;
    let marked = if whole.trained.is_empty() { by_prefixes(chat, template, whole)? } else { by_marks(chat, whole)? };
    if marked.trained.iter().all(std::ops::Range::is_empty) {
        return Err("the model's chat template renders nothing of what the assistant says".into());
    }
    Ok(marked)
}

/// Leaves those marks that belong to turns without weight out.
fn by_marks(chat: &Chat, mut whole: Marked) -> Result<Marked, String> {
    let turns: Vec<bool> =
        chat.messages.iter().filter(|message| message.role() == "assistant").map(|message| message.trained).collect();
    if turns.iter().all(|trained| *trained) {
        return Ok(whole);
    }
    if turns.len() != whole.trained.len() {
        return Err(format!(
            "the assistant has {} turns and the model's chat template marks {}, so it is not known which have weight 0: \
             leave weight out, or end the messages before the turn that is not to be trained",
            turns.len(),
            whole.trained.len()
        ));
    }
    let mut turns = turns.into_iter();
    whole.trained.retain(|_| turns.next() == Some(true));
    Ok(whole)
}

fn by_prefixes(chat: &Chat, template: &Template, mut whole: Marked) -> Result<Marked, String> {
    for (i, message) in chat.messages.iter().enumerate().filter(|(_, message)| message.trained) {
        let before = template.render(chat, i, true).map_err(|why| format!("messages[{i}]: {why}"))?.text;
        let after = if i + 1 == chat.messages.len() {
            whole.text.clone()
        } else {
            template.render(chat, i + 1, false).map_err(|why| format!("messages[{i}]: {why}"))?.text
        };
        if !after.starts_with(&before) || !whole.text.starts_with(&after) {
            return Err(format!(
                "messages[{i}]: the model's chat template renders the messages before this turn of the {} otherwise once it \
                 is followed by more, so it is not known which tokens are its own: put {{% generation %}} and {{% \
                 endgeneration %}} around the assistant's content in the template, give all turns but the last weight 0, or \
                 write the line as prompt and completion",
                message.role()
            ));
        }
        whole.trained.push(before.len()..after.len());
    }
    Ok(whole)
}
