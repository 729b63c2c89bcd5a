use super::*;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::thread::sleep;

fn sink(text: &str) -> Sink {
    text.parse::<LogTarget>().unwrap().open()
}

#[test]
fn a_target_is_parsed_and_printed_alike_and_other_texts_are_rejected() {
    for text in
        ["stdout", "file:/var/log/egret/flows.json", "syslog:[2001:db8::1]:514", "syslog:log:514", "unix:/run/x"]
    {
        assert_eq!(text.parse::<LogTarget>().unwrap().to_string(), text);
    }
    for text in ["", "stderr", "file:", "file:relative", "unix:", "syslog:host", "syslog:host:x", "http://x"] {
        assert!(text.parse::<LogTarget>().unwrap_err().contains("write stdout, file:/PATH"), "{text:?}");
    }
}

#[test]
fn a_file_that_was_renamed_or_truncated_is_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("flows.json");
    let mut sink = sink(&format!("file:{}", path.display()));
    let mut write = |line: &str| sink.write(line.as_bytes()).1.unwrap();
    write("1\n");
    fs::rename(&path, directory.path().join("flows.json.1")).unwrap();
    sleep(LOOK);
    write("2\n");
    assert_eq!(fs::read_to_string(directory.path().join("flows.json.1")).unwrap(), "1\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "2\n");
    File::options().write(true).truncate(true).open(&path).unwrap();
    write("3\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "3\n", "copytruncate");
    fs::remove_file(&path).unwrap();
    sleep(LOOK);
    write("4\n");
    assert_eq!(fs::read_to_string(&path).unwrap(), "4\n");
}

#[test]
fn a_directory_a_fifo_and_a_link_are_rejected() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::create_dir(at("directory")).unwrap();
    nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink("/dev/null", at("link")).unwrap();
    for name in ["directory", "fifo", "link"] {
        let mut sink = LogTarget::File(at(name)).open();
        assert!(matches!(sink.write(b"1\n"), (0, Err(_))), "{name}");
    }
    let mut sink = LogTarget::File(at("later/flows.json")).open();
    assert_eq!(sink.write(b"lost\n").0, 0);
    fs::create_dir(at("later")).unwrap();
    assert_eq!(sink.write(b"1\n").0, 1, "its directory is there now");
}

#[test]
fn a_listening_program_receives_lines_also_after_it_was_restarted() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("stream");
    let mut stream = sink(&format!("unix:{}", path.display()));
    assert_eq!(stream.write(b"lost\n").0, 0, "nobody listens");
    let listener = UnixListener::bind(&path).unwrap();
    assert_eq!(stream.write(b"1\n2\n").0, 2);
    let mut text = [0; 4];
    let (mut accepted, _) = listener.accept().unwrap();
    accepted.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"1\n2\n");
    drop(accepted);
    assert_eq!(stream.write(b"lost\n").0, 0);
    assert_eq!(stream.write(b"3\n4\n").0, 2);
    listener.accept().unwrap().0.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"3\n4\n");

    let path = directory.path().join("datagram");
    let receiver = UnixDatagram::bind(&path).unwrap();
    assert_eq!(sink(&format!("unix:{}", path.display())).write(b"5\n6\n").0, 2);
    let mut line = [0; 10];
    for expected in [b"5", b"6"] {
        let length = receiver.recv(&mut line).unwrap();
        assert_eq!(&line[..length], expected);
    }
}

#[test]
fn a_syslog_server_gets_each_line_with_a_header() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let mut sink = sink(&format!("syslog:{}", server.local_addr().unwrap()));
    assert_eq!(sink.write(b"{}\n").0, 1);
    let mut line = [0; 300];
    let (length, _) = server.recv_from(&mut line).unwrap();
    let text = String::from_utf8_lossy(&line[..length]);
    assert!(text.starts_with("<134>1 2") && text.ends_with(" egretd - flow - {}"), "{text}");
}
