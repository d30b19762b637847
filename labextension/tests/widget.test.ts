import { afterEach, expect, test } from 'vitest'
import widget from '../src/widget'
import states from './states.json'

type Slot = (sender: unknown, status: string) => void

/** An anywidget model, and a kernel that Jupyter's widget manager knows. */
class FakeModel {
  sent: unknown[] = []
  slots: Slot[] = []
  connections: Slot[] = []
  listeners: Record<string, ((...values: unknown[]) => void)[]> = {}
  widget_manager: unknown = {
    kernel: {
      statusChanged: {
        connect: (slot: Slot) => this.slots.push(slot),
        disconnect: (slot: Slot) => {
          this.slots = this.slots.filter(other => other !== slot)
        },
      },
      connectionStatusChanged: {
        connect: (slot: Slot) => this.connections.push(slot),
        disconnect: (slot: Slot) => {
          this.connections = this.connections.filter(other => other !== slot)
        },
      },
    },
  }

  constructor(private readonly traits: Record<string, unknown>) {}

  get = (name: string) => this.traits[name]
  send = (content: unknown) => this.sent.push(content)
  on = (event: string, callback: (...values: unknown[]) => void) => (this.listeners[event] ??= []).push(callback)
  off = (event: string, callback: unknown) => {
    this.listeners[event] = (this.listeners[event] ?? []).filter(other => other !== callback)
  }

  fire(event: string, ...values: unknown[]) {
    for (const callback of this.listeners[event] ?? []) callback(...values)
  }
}

afterEach(() => document.body.replaceChildren())

test('the hub greets the kernel, and shows what it sends in its place', () => {
  const model = new FakeModel({ key: 'k' })
  document.body.append(Object.assign(document.createElement('div'), { id: 'place' }))
  const place = document.getElementById('place') as HTMLElement
  place.dataset.llmMagic = 'k/1'
  const end = widget.initialize({ model })
  // The place that is there already, and the kernel.
  expect(model.sent).toEqual([{ type: 'hello', view: '1' }, { type: 'hello' }])
  model.fire('msg:custom', { type: 'state', view: '1', state: states.halved })
  const live = () => place.querySelector('.llm-magic-live')?.shadowRoot?.textContent ?? ''
  expect(live()).toContain('SmolLM2')
  for (const slot of model.slots) slot(null, 'busy')
  expect(live()).not.toContain('Model unloaded')
  for (const slot of model.slots) slot(null, 'autorestarting')
  expect(live()).toContain('Model unloaded')
  end?.()
  expect([model.slots, model.connections]).toEqual([[], []])
})

test('a connection that comes back is asked for what was said meanwhile', () => {
  const model = new FakeModel({ key: 'k' })
  const place = document.createElement('div')
  place.dataset.llmMagic = 'k/1'
  document.body.append(place)
  const end = widget.initialize({ model })
  model.fire('msg:custom', { type: 'state', view: '1', state: states.halved })
  model.fire('msg:custom', { type: 'state', view: '2', state: states.halved })
  const connection = (status: string) => model.connections.forEach(slot => slot(null, status))
  model.sent = []
  connection('connected')
  expect(model.sent).toEqual([])
  connection('connecting')
  expect(model.sent).toEqual([])
  connection('connected')
  expect(model.sent).toEqual([{ type: 'hello', view: '1' }])
  connection('connected')
  expect(model.sent).toHaveLength(1)
  end?.()
})

test('a widget without a key has no hub', () => {
  const model = new FakeModel({ key: '' })
  expect(widget.initialize({ model })).toBeUndefined()
  expect(model.sent).toEqual([])
})

test.each([undefined, {}, { kernel: null }])('a host that knows no kernel (%o) is fine', manager => {
  const model = new FakeModel({ view: 'a', state: states.laptop })
  model.widget_manager = manager
  const el = document.createElement('div')
  document.body.append(el)
  const end = widget.render({ model, el })
  const text = () => el.querySelector('.llm-magic-live')?.shadowRoot?.textContent ?? ''
  expect(text()).toContain('Laptop')
  expect(model.sent).toEqual([{ type: 'hello', view: 'a' }])
  model.fire('comm:close')
  expect(text()).toContain('Model unloaded')
  end()
})
