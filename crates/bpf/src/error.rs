//! Why the programs cannot be loaded.

use std::io;

/// Why the programs cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// They are compiled for processors with the other byte order.
    #[error("the programs are compiled for little-endian processors")]
    ByteOrder,
    /// The kernel rejects the loading program itself.
    #[error("the kernel takes no eBPF programs: {0}; needed are CAP_BPF, CAP_PERFMON and Linux 6.6 with BTF")]
    Loader(io::Error),
    /// The kernel rejects a map or a program.
    #[error("the kernel rejects an eBPF program: {error}{reason}")]
    Rejected {
        /// The error.
        error: io::Error,
        /// The reason in the verifier's log, empty or with what separates it from the error.
        reason: String,
    },
    /// The kernel has no hooks of interfaces for programs of several parties.
    #[error("the kernel attaches no eBPF programs to interfaces by tcx: {0}; Linux 6.6 does")]
    NoHooks(io::Error),
    /// The number of processors cannot be read.
    #[error("cannot read the number of processors")]
    Processors(#[source] io::Error),
}

/// The reason in a verifier's log, which ends with it, after instructions and before a summary.
pub(crate) fn reason(log: &str) -> String {
    let is_summary = |line: &&str| {
        ["processed ", "verification time", "stack depth", "max_states"].iter().any(|start| line.starts_with(start))
    };
    let last = log.lines().map(str::trim).rfind(|line| !line.is_empty() && !is_summary(line));
    last.map(|line| format!(": {line}")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown is an error with its sources.
    #[test]
    fn no_error_names_its_cause_twice() {
        let cause = || io::Error::other("no luck");
        let rejected = LoadError::Rejected { error: cause(), reason: String::new() };
        for error in [LoadError::Loader(cause()), rejected, LoadError::NoHooks(cause()), LoadError::Processors(cause())]
        {
            let sources = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
            let shown = sources.map(ToString::to_string).collect::<Vec<_>>().join(": ");
            assert_eq!(shown.matches("no luck").count(), 1, "{shown}");
        }
    }

    #[test]
    fn a_verifiers_log_is_shortened_to_its_reason() {
        let log = "0: R1=ctx() R10=fp0\n; int enter(struct __sk_buff *skb)\n0: (bf) r6 = r1\n\
                   calling kernel function bpf_skb_ct_lookup is not allowed\n\
                   processed 12 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0\n";
        assert_eq!(reason(log), ": calling kernel function bpf_skb_ct_lookup is not allowed");
        assert_eq!(reason(""), "");
    }
}
