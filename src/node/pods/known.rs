//! Finds the pod of the cluster to which an attachment belongs.

use crate::model::{Cluster, ObjectKey, Pod};
use egret_cni::attachment::Attachment;

/// Whether the cluster knows an attachment's pod.
pub fn is_known(attachment: &Attachment, cluster: &Cluster) -> bool {
    known(attachment, cluster).is_some()
}

/// An attachment's pod in the cluster; `None` if the pod of that name is another one.
pub(super) fn known<'a>(attachment: &Attachment, cluster: &'a Cluster) -> Option<&'a Pod> {
    let key = ObjectKey::new(&attachment.pod.namespace, &attachment.pod.name);
    cluster.pods.get(&key).map(|pod| &**pod).filter(|pod| is_same(&pod.uid, &attachment.pod.uid))
}

/// Whether these uids can be of one pod. Not every source and runtime reports them, and then they are empty.
pub(super) fn is_same(uid: &str, other: &str) -> bool {
    uid.is_empty() || other.is_empty() || uid == other
}
