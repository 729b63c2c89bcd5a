//! A proxy before the API server that closes every connection after a while.

use lab::Lab;
use lab::api::API;
use lab::machine;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

/// Listens on a port of the API server's host, and closes each connection after `life`.
pub fn cutting(lab: &Lab, port: u16, life: Duration) {
    let namespaces = lab.host("api").namespaces();
    let listener = namespaces.within(|| machine::bound(|| TcpListener::bind((API, port))).expect("listen"));
    // The thread ends with the test's process. What it has open keeps nothing else alive.
    thread::spawn(move || {
        namespaces.enter();
        for client in listener.incoming().flatten() {
            let Ok(server) = TcpStream::connect((API, 6443)) else { continue };
            let (client2, server2) = (client.try_clone().expect("a handle"), server.try_clone().expect("a handle"));
            let (client3, server3) = (client.try_clone().expect("a handle"), server.try_clone().expect("a handle"));
            thread::spawn(move || copy(client, server));
            thread::spawn(move || copy(server2, client2));
            thread::spawn(move || {
                thread::sleep(life);
                let _ = client3.shutdown(Shutdown::Both);
                let _ = server3.shutdown(Shutdown::Both);
            });
        }
    });
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = [0; 16 << 10];
    while let Ok(size @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..size]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
