//! A network configuration as a file's text: its plugin chain, and the position of the `egret-cni` entry in it.
//!
//! The text is edited, never serialised again: the order of keys, unknown fields, numbers and white space stay, and
//! removing the entry restores the original text.

use egret_cni::config::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use egret_cni::version::Version;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::ops::Range;

/// The plugin's type, which is also its file's name.
pub const PLUGIN: &str = "egret-cni";

/// The entry's fields. A path that equals the plugin's default is not written.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The daemon's socket.
    pub socket: &'a str,
    /// The daemon's state directory.
    pub state_dir: &'a str,
}

/// Suffix of a replacement list's name, after the file's name without its extension.
const REPLACEMENT: &str = "-egret.conflist";

/// A configuration file's kind, which its name tells (libcni, and so every runtime).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `.conflist`: a list of plugins.
    List,
    /// `.conf` and `.json`: one plugin.
    Single,
}

impl Kind {
    /// The kind of a file of this name; `None` if runtimes do not read it.
    pub fn of(name: &str) -> Option<Kind> {
        match name.rsplit_once('.')?.1 {
            "conflist" => Some(Kind::List),
            "conf" | "json" => Some(Kind::Single),
            _ => None,
        }
    }
}

/// The name of the replacement list, which runtimes read instead of a file that cannot be extended. It sorts before the
/// file, because `-` sorts before `.`, and runtimes take the first name. (`10-x.conflist` would sort after
/// `10-x.conf`.) The file itself is not changed: its owner finds it, and nothing has to be restored.
pub fn replacement(name: &str) -> String {
    format!("{}{REPLACEMENT}", name.rsplit_once('.').map_or(name, |(stem, _)| stem))
}

/// A parsed network configuration.
#[derive(Debug)]
pub struct Network<'a> {
    text: &'a str,
    kind: Kind,
    name: Option<&'a RawValue>,
    version: Option<&'a RawValue>,
    /// Whether the plugin supports the version in which the runtime will call it, or why not.
    speakable: Result<(), String>,
    plugins: Vec<Plugin<'a>>,
}

#[derive(Debug)]
struct Plugin<'a> {
    text: &'a str,
    fields: PluginFields<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Fields<'a> {
    #[serde(borrow)]
    name: Option<&'a RawValue>,
    #[serde(borrow)]
    cni_version: Option<&'a RawValue>,
    cni_versions: Option<Vec<String>>,
    #[serde(borrow)]
    plugins: Option<Vec<&'a RawValue>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct PluginFields<'a> {
    #[serde(rename = "type", borrow)]
    kind: Option<&'a RawValue>,
    #[serde(borrow)]
    socket: Option<&'a RawValue>,
    #[serde(borrow)]
    state_dir: Option<&'a RawValue>,
    #[serde(borrow)]
    stands_for: Option<&'a RawValue>,
}

impl<'a> Network<'a> {
    /// Reads a file's text.
    ///
    /// # Errors
    /// Why a runtime would reject the file.
    pub fn read(text: &'a str, kind: Kind) -> Result<Self, String> {
        let fields: Fields<'a> =
            serde_json::from_str(text).map_err(|e| format!("it cannot be read as a network configuration: {e}"))?;
        let plugins = match kind {
            Kind::Single => vec![serde_json::from_str(text).map_err(|e| e.to_string())?],
            Kind::List => fields.plugins.unwrap_or_default(),
        };
        if plugins.is_empty() {
            return Err("it has no plugins".into());
        }
        let plugins = plugins.into_iter().map(Plugin::read).collect::<Result<_, _>>()?;
        if kind == Kind::List && !fields.name.is_some_and(is_named) {
            return Err("it has no name".into());
        }
        let version = fields.cni_version.map(|v| string(v).ok_or(format!("its cniVersion {v} is no string")));
        let speakable = newest(version.transpose()?, fields.cni_versions.unwrap_or_default());
        Ok(Network { text, kind, name: fields.name, version: fields.cni_version, speakable, plugins })
    }

    /// Checks that `egret-cni` can be chained to the network.
    ///
    /// # Errors
    /// Why it cannot.
    pub fn check(&self) -> Result<(), String> {
        if !self.name.is_some_and(is_named) {
            return Err("it has no name; give the network a name".into());
        }
        self.speakable.clone()
    }

    /// The name of the file that this list replaces, if [`Network::standing_for`] made the list.
    pub fn stands_for(&self) -> Option<String> {
        self.entries().find_map(|entry| string(entry.fields.stands_for?))
    }

    /// Whether `egret-cni` is in the chain.
    pub fn has_entry(&self) -> bool {
        self.kind == Kind::List && self.entries().next().is_some()
    }

    /// The list's text with `egret-cni` in its place or at the end, with `entry`'s values. The text is unchanged if
    /// it has them already.
    pub fn extended(&self, entry: Entry<'_>) -> String {
        if !self.has_entry() {
            return self.appended(&entry.text(None));
        }
        let mut edits: Vec<(Range<usize>, String)> = Vec::new();
        for own in self.entries() {
            let after = own.fields.kind.map_or(0, |kind| self.range(kind.get()).end);
            for (name, there, wanted, default) in [
                ("socket", own.fields.socket, entry.socket, DEFAULT_SOCKET),
                ("stateDir", own.fields.state_dir, entry.state_dir, DEFAULT_STATE_DIR),
            ] {
                match there {
                    Some(value) if string(value).as_deref() != Some(wanted) => {
                        edits.push((self.range(value.get()), quoted(wanted)));
                    }
                    None if wanted != default => {
                        edits.push((after..after, format!(", \"{name}\": {}", quoted(wanted))))
                    }
                    _ => {}
                }
            }
        }
        // Edit from the end, so that earlier positions stay valid.
        edits.sort_by_key(|(range, _)| std::cmp::Reverse(range.start));
        let mut text = self.text.to_owned();
        edits.into_iter().for_each(|(range, with)| text.replace_range(range, &with));
        text
    }

    /// The replacement list for the file of this name, with `egret-cni` at its end. A single plugin becomes a list of
    /// its own name and version, as in libcni (`ConfListFromConf`).
    pub fn standing_for(&self, file: &str, entry: Entry<'_>) -> String {
        let entry = entry.text(Some(file));
        match self.kind {
            Kind::Single => {
                let text = |value: Option<&RawValue>| value.map_or("\"\"", RawValue::get).to_owned();
                let plugin = self.plugins.first().map_or("", |p| p.text);
                format!(
                    "{{\n  \"cniVersion\": {},\n  \"name\": {},\n  \"plugins\": [\n    {plugin},\n    {entry}\n  ]\n}}\n",
                    text(self.version),
                    text(self.name),
                )
            }
            Kind::List => {
                let plain = self.without_entry();
                match Network::read(&plain, Kind::List) {
                    Ok(network) => network.appended(&entry),
                    // The list had no plugin but egret-cni.
                    Err(_) => self.text.to_owned(),
                }
            }
        }
    }

    /// The list's text without `egret-cni`.
    pub fn without_entry(&self) -> String {
        let mut text = self.text.to_owned();
        if self.kind == Kind::Single {
            return text;
        }
        let range = |at: usize| self.range(self.plugins[at].text);
        let first = self.plugins.iter().position(|p| !p.is_ours());
        // Remove the comma and the space as well that were added with the entry.
        for at in (first.unwrap_or(0) + 1..self.plugins.len()).rev().filter(|at| self.plugins[*at].is_ours()) {
            text.replace_range(range(at - 1).end..range(at).end, "");
        }
        match first {
            Some(0) => {}
            Some(first) => text.replace_range(range(0).start..range(first).start, ""),
            None if self.plugins.is_empty() => {}
            None => text.replace_range(range(0), ""),
        }
        text
    }

    fn entries(&self) -> impl Iterator<Item = &Plugin<'a>> {
        self.plugins.iter().filter(|p| p.is_ours())
    }

    /// The text with the entry after the last plugin, with the same white space as before that one.
    fn appended(&self, entry: &str) -> String {
        let Some(last) = self.plugins.last().map(|p| self.range(p.text)) else { return self.text.to_owned() };
        let before = &self.text[..last.start];
        let space = &before[before.trim_end().len()..];
        format!("{},{space}{entry}{}", &self.text[..last.end], &self.text[last.end..])
    }

    /// The position of a part of the text.
    fn range(&self, piece: &str) -> Range<usize> {
        let start = piece.as_ptr().addr() - self.text.as_ptr().addr();
        start..start + piece.len()
    }
}

impl<'a> Plugin<'a> {
    fn read(value: &'a RawValue) -> Result<Self, String> {
        let fields: PluginFields<'a> =
            serde_json::from_str(value.get()).map_err(|e| format!("one of its plugins cannot be read: {e}"))?;
        if !fields.kind.is_some_and(is_named) {
            return Err("one of its plugins has no type".into());
        }
        Ok(Plugin { text: value.get(), fields })
    }

    fn is_ours(&self) -> bool {
        self.fields.kind.and_then(string).is_some_and(|kind| kind == PLUGIN)
    }
}

/// Checks the version in which a runtime calls the plugins: the newest that the configuration offers and the runtime
/// knows.
fn newest(version: Option<String>, others: Vec<String>) -> Result<(), String> {
    let parts = |text: &String| text.split('.').map(|part| part.parse::<u32>().unwrap_or(u32::MAX)).collect::<Vec<_>>();
    let Some(newest) = version.into_iter().chain(others).max_by_key(parts) else {
        let list = Version::list();
        return Err(format!("it has no cniVersion, which means 0.1.0; egret-cni speaks {list}"));
    };
    Version::parse(&newest).map(drop).map_err(|e| format!("its {}; egret-cni speaks {}", e.msg, Version::list()))
}

fn string(value: &RawValue) -> Option<String> {
    serde_json::from_str(value.get()).ok()
}

fn is_named(value: &RawValue) -> bool {
    string(value).is_some_and(|text| !text.is_empty())
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

impl Entry<'_> {
    /// The entry's JSON; in a replacement list, with the name of the file that the list replaces.
    fn text(self, stands_for: Option<&str>) -> String {
        let state_dir = Some(self.state_dir).filter(|dir| *dir != DEFAULT_STATE_DIR);
        let more = [("stateDir", state_dir), ("standsFor", stands_for)];
        let more = more.iter().filter_map(|(name, value)| Some(format!(", \"{name}\": {}", quoted((*value)?))));
        format!("{{\"type\": \"{PLUGIN}\", \"socket\": {}{}}}", quoted(self.socket), more.collect::<String>())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SOCKET: &str = "/run/egret/cni.sock";

    fn extended(text: &str, socket: &str) -> String {
        Network::read(text, Kind::List).unwrap().extended(Entry { socket, state_dir: DEFAULT_STATE_DIR })
    }

    #[test]
    fn only_the_entry_is_put_in_and_taken_out() {
        let plain = "{\n\t\"plugins\": [\n\t\t{ \"type\":\"a\", \"mtu\": 1.50e3, \"type2\" : null },\n\
                     \t\t{\"x\":[{}],\"type\":\"b\"}\n\t] , \"zz\": 1, \"name\": \"n\\u0041\",\"cniVersion\":\"1.0.0\" }\n\n";
        let with = extended(plain, SOCKET);
        let entry =
            "\"type\":\"b\"},\n\t\t{\"type\": \"egret-cni\", \"socket\": \"/run/egret/cni.sock\"}\n\t] , \"zz\"";
        assert!(with.contains(entry), "{with}");
        assert_eq!(extended(&with, SOCKET), with);
        assert_eq!(Network::read(&with, Kind::List).unwrap().without_entry(), plain);
        let moved = extended(&with, "/x/\"quoted\".sock");
        assert_eq!(moved, with.replace(SOCKET, "/x/\\\"quoted\\\".sock"));
    }

    #[test]
    fn an_entry_without_a_socket_means_the_default_one() {
        let own = r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{"type":"egret-cni"},{"type":"b"}]}"#;
        assert_eq!(extended(own, SOCKET), own);
        let with = extended(own, "/x");
        assert_eq!(with, own.replace(r#""egret-cni""#, r#""egret-cni", "socket": "/x""#));
        let without = Network::read(own, Kind::List).unwrap().without_entry();
        assert_eq!(without, own.replace(r#",{"type":"egret-cni"}"#, ""));
        let first = own.replace(r#"{"type":"a"},"#, "");
        let without = Network::read(&first, Kind::List).unwrap().without_entry();
        assert_eq!(without, first.replace(r#"{"type":"egret-cni"},"#, ""));
        let several = own.replace(r#"{"type":"a"}"#, r#"{"type":"egret-cni"}, {"type":"egret-cni"}"#);
        let without = Network::read(&several, Kind::List).unwrap().without_entry();
        assert_eq!(without, first.replace(r#"{"type":"egret-cni"},"#, ""));
    }

    #[test]
    fn another_state_directory_is_named_and_brought_up_to_date() {
        let own = r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"},{"type":"egret-cni"}]}"#;
        let extended = |text: &str, socket, state_dir| {
            Network::read(text, Kind::List).unwrap().extended(Entry { socket, state_dir })
        };
        let with = extended(own, "/s", "/d");
        let fields: Value = serde_json::from_str(&with).unwrap();
        assert_eq!(fields["plugins"][1], serde_json::json!({"type": "egret-cni", "socket": "/s", "stateDir": "/d"}));
        assert_eq!(extended(&with, "/s", "/d"), with);
        let moved = extended(&with, "/t", DEFAULT_STATE_DIR);
        assert_eq!(moved, with.replace("/s", "/t").replace("/d", DEFAULT_STATE_DIR));
        let new = extended(r#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"a"}]}"#, "/s", "/d");
        assert!(new.ends_with(r#"{"type": "egret-cni", "socket": "/s", "stateDir": "/d"}]}"#), "{new}");
    }

    #[test]
    fn a_single_plugin_becomes_a_list_that_sorts_before_it() {
        let text = "{ \"cniVersion\": \"0.4.0\", \"type\": \"ptp\", \"name\": \"net\", \"mtu\": 9 }\n";
        let list = Network::read(text, Kind::Single)
            .unwrap()
            .standing_for("10-x.conf", Entry { socket: SOCKET, state_dir: DEFAULT_STATE_DIR });
        let network = Network::read(&list, Kind::List).unwrap();
        assert_eq!(network.check(), Ok(()));
        assert_eq!(network.stands_for().as_deref(), Some("10-x.conf"));
        assert!(list.contains(text.trim()), "{list}");
        let value: Value = serde_json::from_str(&list).unwrap();
        assert_eq!((&value["name"], &value["cniVersion"]), (&"net".into(), &"0.4.0".into()));
        for name in ["10-x.conf", "10-x.json", "10-x.conflist", "x.y.conf"] {
            assert!(*replacement(name) < *name, "{name}");
        }
    }

    #[test]
    fn invalid_configurations_and_unsupported_versions_are_rejected() {
        let list = |version: &str| format!(r#"{{{version}"name":"n","plugins":[{{"type":"a"}}]}}"#);
        let check = |text: &str| Network::read(text, Kind::List).unwrap().check();
        for version in [r#""cniVersion":"0.3.1","#, r#""cniVersions":["0.3.0","1.0.0"],"cniVersion":"0.4.0","#] {
            assert_eq!(check(&list(version)), Ok(()));
        }
        for version in ["", r#""cniVersion":"0.2.0","#, r#""cniVersion":"1.0.0","cniVersions":["0.4.0","1.10.0"],"#] {
            assert!(check(&list(version)).unwrap_err().contains("0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0"), "{version}");
        }
        let broken =
            ["", "{", "[]", r#"{"name":"n"}"#, r#"{"name":"n","plugins":[]}"#, r#"{"plugins":[{"type":"a"}]}"#];
        for text in broken.iter().chain(&[r#"{"name":"n","plugins":[{}]}"#, r#"{"name":"n","plugins":[5]}"#]) {
            assert!(Network::read(text, Kind::List).is_err(), "{text}");
        }
        assert!(Network::read(r#"{"name":"n","plugins":[{"type":"a"}]}"#, Kind::Single).is_err());
    }

    proptest! {
        #[test]
        fn removing_the_entry_restores_the_text(space in "[ \n\t]{0,3}", types in prop::collection::vec("[a-z]{1,4}", 1..4)) {
            let plugins: Vec<String> = types.iter().map(|t| format!("{space}{{\"type\":{space}\"{t}\"}}{space}")).collect();
            let plain = format!("{{\"name\":\"n\",{space}\"plugins\":[{}],\"cniVersion\":\"1.0.0\"}}", plugins.join(","));
            let with = extended(&plain, SOCKET);
            let network = Network::read(&with, Kind::List).unwrap();
            prop_assert!(network.has_entry());
            prop_assert_eq!(network.without_entry(), plain);
        }

        /// Any text is rejected, or is unchanged after the entry has been added and removed.
        #[test]
        fn any_accepted_list_can_be_extended_and_restored(
            keys in prop::collection::vec((0..8usize, 0..9usize), 0..6), plugins in prop::collection::vec(0..6usize, 0..4),
            cut in any::<prop::sample::Index>(),
        ) {
            const KEYS: [&str; 8] = ["name", "cniVersion", "cniVersions", "disableCheck", "plugins", "type", "", "egret.dev"];
            const VALUES: [&str; 9] = [
                "null", "\"n\"", "\"1.0.0\"", "[\"1.0.0\", \"0.4.0\"]", "5", "[]", "{ }", "\"\\u007d]\"", "[{\"type\":\"x\"} ]",
            ];
            const PLUGINS: [&str; 6] = [
                "{\"type\":\"a\"}", "{ \"type\" : \"b\", \"x\": [\"]}\", {}] }", "{\"type\":\"egret-cni\"}", "{}", "7",
                "{\"type\":\"egret-cni\",\"socket\":5}",
            ];
            let plugins: Vec<&str> = plugins.iter().map(|p| PLUGINS[*p]).collect();
            let mut fields = vec![format!("\"plugins\": [{}]", plugins.join(" ,"))];
            fields.extend(keys.iter().map(|(key, value)| format!("{:?}:{}", KEYS[*key], VALUES[*value])));
            let text = format!("{{{}}}\n", fields.join(", "));
            for (text, kind) in [(&text[..], Kind::List), (&text, Kind::Single), (&text[..cut.index(text.len())], Kind::List)] {
                let Ok(network) = Network::read(text, kind) else { continue };
                if network.check().is_err() || kind == Kind::Single {
                    continue;
                }
                let with = network.extended(Entry { socket: SOCKET, state_dir: DEFAULT_STATE_DIR });
                let extended = Network::read(&with, kind).map_err(TestCaseError::fail)?;
                prop_assert!(extended.has_entry(), "{with}");
                if !network.has_entry() {
                    prop_assert_eq!(extended.without_entry(), text);
                }
            }
        }
    }
}
