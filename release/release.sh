#!/bin/bash
# Makes everything of a release, in target/release-VERSION: programs, `kubectl egret` with its manifest for krew, image,
# manifests, chart, definitions, what the programs are made of, checksums. The manifests name the image by its digest.
#   release/release.sh IMAGE        registry.example/egret:v0.1.0, where the image is going to be
set -eu
image=$1
cd "$(dirname "$0")/.."
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -1)
out=$PWD/target/release-$version
rm -rf "$out"
mkdir -p "$out"

as_root=()
[ "$(id -u)" = 0 ] || as_root=(sudo -E)
work=$(mktemp -d -p target)
trap '"${as_root[@]}" rm -rf "$work"' EXIT
"${as_root[@]}" tests/image.sh "$work" "$image" release
# The programs are the ones of the image.
machine=$(rustc -vV | sed -n 's/^host: //p')
for program in egretd egret-cni; do cp "$work/programs/$program" "$out/$program-$machine"; done
# `kubectl egret` is for people's machines, and not in the image. It was built with the image's programs.
case $machine in x86_64-*) arch=amd64 ;; aarch64-*) arch=arm64 ;; *) arch=${machine%%-*} ;; esac
archive=kubectl-egret-v$version-linux-$arch.tar.gz
mkdir "$work/plugin"
cp "target/image/build/$machine/release/kubectl-egret" install/krew/kubectl_complete-egret LICENSE "$work/plugin/"
# By this name it is for hosts without Kubernetes.
ln -s kubectl-egret "$work/plugin/egretctl"
tar -C "$work/plugin" --sort=name --mode=u+rwX,go+rX,go-w --mtime=@0 --owner=0 --group=0 --numeric-owner -cf - . |
  gzip -n >"$out/$archive"
sum=$(sha256sum "$out/$archive" | cut -d' ' -f1)
sed "s|0\{64\}|$sum|; s|arch: amd64|arch: $arch|; s|linux-amd64|linux-$arch|g" install/krew/egret.yaml >"$out/krew-egret.yaml"
release/sbom.sh "$out/egret-$version.cdx.json"
mv "$work/image-oci.tar" "$out/egret-$version-image-oci.tar"
digest=$(cat "$work/digest")
echo "$image@$digest" >"$out/image-digest"

cp -r install "$work/install"
cp install/crds.yaml "$out/"
for file in egret.yaml uninstall.yaml; do
  sed "s|egret.invalid/egret:v$version|$image@$digest|" "install/$file" >"$out/$file"
done
# What `helm package` writes: the chart's directory, under its name. Without times and users, to be the same each time.
repository=${image%:*} tag=${image##*:}
sed -i "s|^  repository: egret.invalid/egret$|  repository: $repository|; s|^  tag: \"\"$|  tag: \"$tag@$digest\"|" "$work/install/chart/values.yaml"
tar -C "$work/install" --sort=name --mode=u+rwX,go+rX,go-w --mtime=@0 --owner=0 --group=0 --numeric-owner --transform 's|^chart|egret|' -cf - chart |
  gzip -n >"$out/egret-$version.tgz"
(cd "$out" && sha256sum -- * >SHA256SUMS)
echo "release: $out"
(cd "$out" && cat SHA256SUMS)
