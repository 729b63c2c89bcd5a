//! Images made on the spot: of static programs, packed as an archive of OCI's image layout,
//! <https://github.com/opencontainers/image-spec/blob/main/image-layout.md>; and Egret's own, by its Dockerfile.

use lab::host::checked;
use lab::leftovers;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

/// Of which pods' sandboxes are made: its one program is the test itself.
pub const POD: &str = "egret.test/pod:1";

/// What an image is made of.
pub struct Image<'a> {
    /// Its name.
    pub name: &'a str,
    /// What lies in its root.
    pub programs: &'a [&'a Path],
    /// What is run.
    pub entrypoint: &'a [&'a str],
}

/// Packs an image in the directory, for a lab.
pub fn pack(directory: &Path, lab: &str, image: &Image) -> PathBuf {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).expect("make a directory");
    let root = directory.join("root");
    fs::create_dir_all(&root).expect("make a directory");
    for program in image.programs {
        let inside = root.join(program.file_name().expect("a program's name"));
        // Without its symbols it is a tenth as big.
        checked(&["strip", "-o", &inside.display().to_string(), &program.display().to_string()], None);
    }
    let layer = directory.join("layer.tar");
    let [archive, base] = [&layer, &root].map(|p| p.display().to_string());
    checked(&["tar", "-cf", &archive, "--owner=0", "--group=0", "-C", &base, "."], None);
    let diff = digest(&layer);
    fs::rename(&layer, blobs.join(&diff)).expect("rename");
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let config = blob(
        &blobs,
        &json!({
            "architecture": architecture, "os": "linux",
            "config": {"Entrypoint": image.entrypoint, "Env": [format!("{}={lab}", leftovers::VARIABLE)]},
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{diff}")]}
        }),
    );
    let media = |kind: &str| format!("application/vnd.oci.image.{kind}");
    let manifest = blob(
        &blobs,
        &json!({
            "schemaVersion": 2, "mediaType": media("manifest.v1+json"),
            "config": descriptor(&blobs, &media("config.v1+json"), &config),
            "layers": [descriptor(&blobs, &media("layer.v1.tar"), &diff)]
        }),
    );
    let mut entry = descriptor(&blobs, &media("manifest.v1+json"), &manifest);
    // Which name `ctr images import` gives it.
    entry["annotations"] = json!({"io.containerd.image.name": image.name});
    let index = json!({"schemaVersion": 2, "mediaType": media("index.v1+json"), "manifests": [entry]});
    fs::write(directory.join("index.json"), index.to_string()).expect("write");
    fs::write(directory.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).expect("write");
    let archive = directory.join("image.tar");
    let (file, base) = (archive.display().to_string(), directory.display().to_string());
    checked(&["tar", "-cf", &file, "-C", &base, "oci-layout", "index.json", "blobs"], None);
    archive
}

/// The image that the Dockerfile makes.
pub struct Own {
    /// As `docker save` writes it.
    pub archive: PathBuf,
    /// The paths in it that are not Debian's.
    pub added: Vec<String>,
}

/// Builds the image by the Dockerfile, in the directory, under a name.
pub fn by_the_dockerfile(directory: &Path, name: &str) -> Own {
    fs::create_dir_all(directory).expect("make a directory");
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/image.sh");
    checked(&[script, &directory.display().to_string(), name], None);
    let added = fs::read_to_string(directory.join("added")).expect("what was added");
    Own { archive: directory.join("image.tar"), added: added.lines().map(str::to_owned).collect() }
}

fn digest(file: &Path) -> String {
    let said = checked(&["sha256sum", &file.display().to_string()], None);
    said.split_whitespace().next().expect("sha256sum's answer").to_owned()
}

fn blob(blobs: &Path, content: &Value) -> String {
    let new = blobs.join("new");
    fs::write(&new, content.to_string()).expect("write");
    let digest = digest(&new);
    fs::rename(new, blobs.join(&digest)).expect("rename");
    digest
}

fn descriptor(blobs: &Path, media: &str, digest: &str) -> Value {
    let size = fs::metadata(blobs.join(digest)).expect("a blob").len();
    json!({"mediaType": media, "digest": format!("sha256:{digest}"), "size": size})
}
