//! Egret under a real container runtime, Debian's containerd, called as by a kubelet. Its pods are real processes
//! that send their names to a server outside, and the server records their source addresses. Needs root.

mod changes;
mod coming_and_going;
mod cri;
mod image;
mod messages;
mod node_start;
mod own_pod;
mod recorder;
mod runtime;
mod site;
mod starts;
mod visitor;
