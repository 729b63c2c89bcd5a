//! Egret under a real container runtime: Debian's containerd, asked as a kubelet asks it, runs pods that are real
//! processes, which say their names to a server outside. It listens to where they come from.

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
