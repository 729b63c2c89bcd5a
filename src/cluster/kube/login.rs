//! Credentials for the API server: a pod's, those of a kubeconfig file, or a person's.

use crate::cluster::{KubeOptions, Person};
use anyhow::{Context, bail};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use std::path::{Path, PathBuf};

/// Where credentials are read from, and read again when the API server no longer accepts them.
#[derive(Clone, Debug)]
pub struct Login {
    kubeconfig: Option<PathBuf>,
    person: Option<Person>,
}

impl Login {
    /// The credentials that the options name.
    pub fn of(options: &KubeOptions) -> Self {
        Login { kubeconfig: options.kubeconfig.clone(), person: options.person.clone() }
    }

    /// Reads the credentials.
    ///
    /// # Errors
    /// There are no credentials, or they are invalid.
    pub async fn config(&self) -> anyhow::Result<Config> {
        let options =
            KubeConfigOptions { context: self.person.as_ref().and_then(|p| p.context.clone()), ..Default::default() };
        match (&self.kubeconfig, &self.person) {
            (Some(path), _) => {
                let of_file = || format!("kubeconfig {}", path.display());
                let file = Kubeconfig::read_from(path).with_context(of_file)?;
                Config::from_custom_kubeconfig(file, &options).await.with_context(of_file)
            }
            (None, Some(_)) => of_person(&options).await,
            (None, None) => Config::incluster().context(
                "this is not a pod with a ServiceAccount token; outside of Kubernetes, name a kubeconfig file with --kubeconfig",
            ),
        }
    }
}

/// The credentials that kubectl finds: the files of $KUBECONFIG, of which some may be missing, or ~/.kube/config, or a
/// pod's (<https://kubernetes.io/docs/concepts/configuration/organize-cluster-access-kubeconfig/>).
async fn of_person(options: &KubeConfigOptions) -> anyhow::Result<Config> {
    let named = std::env::var_os("KUBECONFIG").filter(|text| !text.is_empty());
    let home = std::env::var_os("HOME").filter(|text| !text.is_empty());
    let files: Vec<PathBuf> = match &named {
        Some(paths) => std::env::split_paths(paths).filter(|p| !p.as_os_str().is_empty()).collect(),
        None => home.iter().map(|home| Path::new(home).join(".kube/config")).collect(),
    };
    let mut merged = None;
    for file in files.iter().filter(|file| Path::exists(file)) {
        let next = Kubeconfig::read_from(file).with_context(|| format!("kubeconfig {}", file.display()))?;
        merged = Some(match merged {
            None => next,
            Some(merged) => {
                Kubeconfig::merge(merged, next).with_context(|| format!("kubeconfig {}", file.display()))?
            }
        });
    }
    let shown: String = files.iter().map(|file| format!(" {}", file.display())).collect();
    match merged {
        Some(merged) => {
            Config::from_custom_kubeconfig(merged, options).await.with_context(|| format!("kubeconfig{shown}"))
        }
        None => match Config::incluster() {
            Ok(config) => Ok(config),
            Err(_) => bail!(
                "there is no kubeconfig file{shown}; name one with --kubeconfig or $KUBECONFIG, or read a directory \
                 with --cluster dir:PATH"
            ),
        },
    }
}
