//! The plugin as a runtime sees it: the built binary, called by the CNI specification, in network namespaces of its
//! own. The tests read its effects from the kernel with `ip`. Needs root.

mod call;
mod conversation;
mod input;
mod interface;
mod node;
mod quarantine;
mod undoing;
