// Runs a pod, follows its events, runs a command in it, and deletes it. Written from contracts/ alone: subjects
// and headers from asyncapi.json, bodies from schemas/.
//
//   npm install nats
//   node run_pod.cjs nats://127.0.0.1:4222 NODE IMAGE
//
// Prints one line of JSON for each event and for each reply. Ends with 0 when all went well.
"use strict";

const { connect, headers, JSONCodec } = require("nats");

const [url, node, image, prefix = "vcnode"] = process.argv.slice(2);
const json = JSONCodec();
const pod = `js-${process.pid}`;
const say = (what, content) => console.log(JSON.stringify({ what, ...content }));

async function command(nc, verb, request) {
  const meta = headers();
  // The same id again would get the same reply, and nothing would be done twice.
  meta.set("Vcnode-Command-Id", `${pod}-${verb}`);
  meta.set("Vcnode-Deadline", new Date(Date.now() + 120_000).toISOString());
  const msg = await nc.request(`${prefix}.rpc.${node}.${verb}`, json.encode(request), {
    headers: meta,
    timeout: 130_000,
  });
  const reply = json.decode(msg.data);
  if (msg.headers?.has("Nats-Service-Error-Code")) {
    throw new Error(`${verb}: ${reply.code}: ${reply.message}`);
  }
  return reply;
}

async function main() {
  const nc = await connect({ servers: url });
  try {
    const deleted = new Promise((resolve) => {
      const events = nc.subscribe(`${prefix}.evt.${node}.*.*.${pod}.>`);
      const podEvents = nc.subscribe(`${prefix}.evt.${node}.pod.*.${pod}`);
      const follow = async (subscription) => {
        for await (const msg of subscription) {
          const event = json.decode(msg.data);
          say("event", { type: event.type, subject: event.subject, sequence: event.sequence });
          if (event.type === "vcnode.pod.deleted") resolve();
        }
      };
      follow(events);
      follow(podEvents);
    });
    await nc.flush();

    const args = ["sleep", "600"];
    const status = await command(nc, "pod.run", { pod: { id: pod, containers: [{ id: "main", image, cmd: { args } }] } });
    say("pod.run", { state: status.state, phases_ms: status.phases_ms });
    const result = await command(nc, "container.exec", {
      pod_id: pod,
      container_id: "main",
      cmd: { args: ["echo", "hello from", pod] },
    });
    say("container.exec", { exit_code: result.exit_code, stdout: result.stdout.data });
    const gone = await command(nc, "pod.delete", { pod_id: pod, force: true });
    say("pod.delete", { existed: gone.existed });
    await deleted;
  } finally {
    await nc.drain();
  }
}

main().catch((error) => {
  console.error(String(error.message ?? error));
  process.exit(1);
});
