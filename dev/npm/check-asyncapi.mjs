// Validates an AsyncAPI document, and all that it refers to, with the AsyncAPI project's own parser.
//
//   node check-asyncapi.mjs FILE
//
// Ends with 1 when the parser finds anything worse than advice.
import { readFile } from "node:fs/promises";
import { resolve } from "node:path";
import { Parser, fromFile } from "@asyncapi/parser";

const file = resolve(process.argv[2]);
await readFile(file); // a clear error when there is none
const { document, diagnostics } = await fromFile(new Parser(), file).parse();
const bad = diagnostics.filter((d) => d.severity <= 1); // 0: error, 1: warning
for (const d of bad) console.error(`${d.path.join(".")}: ${d.message} (${d.code})`);
if (!document || bad.length) process.exit(1);
const kinds = [document.channels(), document.operations(), document.messages()].map((all) => all.all().length);
console.log(`valid: ${kinds[0]} channels, ${kinds[1]} operations, ${kinds[2]} messages`);
