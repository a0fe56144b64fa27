// What the site's own search finds: node search.js SITE QUERY... prints the pages of each query, best first, as JSON.
const fs = require("fs"), path = require("path"), vm = require("vm")

const [site, ...queries] = process.argv.slice(2)
const workers = path.join(site, "assets/javascripts/workers")
const script = fs.readdirSync(workers).find(name => name.startsWith("search") && name.endsWith(".js"))
const { config, docs } = JSON.parse(fs.readFileSync(path.join(site, "search/search_index.json"), "utf8"))

const replies = [], listeners = []
const worker = { console, setTimeout, URL, addEventListener: (_, listener) => listeners.push(listener), postMessage: message => replies.push(message) }
worker.self = worker.window = worker
vm.runInNewContext(fs.readFileSync(path.join(workers, script), "utf8"), worker)
const send = async message => { for (const listener of listeners) await listener({ data: message }) }

const ready = send({ type: 0, data: { config, docs, options: { suggest: false } } })
ready.then(async () => {
  const found = {}
  for (const query of queries) {
    replies.length = 0
    await send({ type: 2, data: query })
    found[query] = replies[0].data.items.map(sections => sections.find(section => !section.parent)?.location ?? sections[0].location)
  }
  console.log(JSON.stringify(found))
})
