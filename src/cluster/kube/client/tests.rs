use super::*;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

/// What a continue token may contain: it is opaque.
const TOKEN: &str = "a+b/c&limit=1#%3D=";

/// Answers a connection's requests: a page with a continue token to a request without one, the last page to a request
/// with that token, and 410 to any other. Returns how many requests there were when the last page has been sent.
fn answer_pages(stream: TcpStream) -> usize {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut requests = 0;
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).unwrap() == 0 {
                return requests;
            }
            if line == "\r\n" {
                break;
            }
            lines.push(line);
        }
        requests += 1;
        let url = format!("http://api{}", lines[0].split(' ').nth(1).unwrap());
        let url: http::Uri = url.parse().unwrap();
        let parameters: Vec<&str> = url.query().unwrap().split('&').collect();
        assert!(parameters.contains(&"limit=500") && parameters.contains(&"labelSelector=app%3Dweb"), "{parameters:?}");
        let token = parameters.iter().find_map(|parameter| parameter.strip_prefix("continue="));
        let page = |name: &str, rest: &str| {
            let items = json!([{"metadata": {"name": name}}]);
            json!({"apiVersion": "v1", "kind": "ServiceList", "metadata": {"continue": rest}, "items": items})
        };
        let (status, body) = match token {
            None => ("200 OK", page("a", TOKEN)),
            Some("a%2Bb%2Fc%26limit%3D1%23%253D%3D") => ("200 OK", page("b", "")),
            Some(other) => ("410 Gone", json!({"reason": "Expired", "message": format!("unknown token {other}")})),
        };
        let body = body.to_string();
        let head = format!("HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n", body.len());
        reader.get_mut().write_all(format!("{head}\r\n{body}").as_bytes()).unwrap();
        if status == "200 OK" && token.is_some() {
            return requests;
        }
    }
}

#[tokio::test]
async fn a_list_is_read_page_by_page_whatever_is_in_the_continue_token() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let server = thread::spawn(move || answer_pages(listener.accept().unwrap().0));
    let directory = tempfile::tempdir().unwrap();
    let kubeconfig = directory.path().join("kubeconfig");
    let text = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    std::fs::write(&kubeconfig, text.to_string()).unwrap();
    let client =
        Client::connect(&KubeOptions { kubeconfig: Some(kubeconfig), ..KubeOptions::default() }).await.unwrap();
    let listed = client.list::<Value>("/api/v1/services", "labelSelector=app%3Dweb").await.unwrap();
    let names: Vec<&str> = listed.items.iter().map(|item| item["metadata"]["name"].as_str().unwrap()).collect();
    assert_eq!((names, &*listed.kind, &*listed.api_version), (vec!["a", "b"], "ServiceList", "v1"));
    assert_eq!(server.join().unwrap(), 2);
}
