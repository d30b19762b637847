import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { Hub } from '../src/hub'
import * as views from '../src/views'
import type { Command, Event, State } from '../src/wire'
import states from './states.json'

const map = states.halved as unknown as State
const machine = states.laptop as unknown as State
let sent: Command[]
let hub: Hub

function place(view: string, text = 'static'): HTMLElement {
  const element = document.createElement('div')
  element.dataset.llmMagic = `key/${view}`
  const kept = document.createElement('div')
  kept.textContent = text
  element.append(kept)
  document.body.append(element)
  return element
}

const settled = () => new Promise(resolve => setTimeout(resolve))
const shown = (element: HTMLElement) => element.querySelector('.llm-magic-live')?.shadowRoot?.textContent ?? ''
const kept = (element: HTMLElement) => element.firstElementChild as HTMLElement
const show = (view: string, state = map) => hub.receive({ type: 'state', view, state })

beforeEach(() => {
  sent = []
  hub = new Hub('key', command => sent.push(command))
})

afterEach(() => {
  hub.dispose()
  document.body.replaceChildren()
})

test('a view stands over the static HTML, and says hello', () => {
  const element = place('a')
  show('a')
  expect(shown(element)).toContain('SmolLM2')
  expect(kept(element).hidden).toBe(true)
  expect(sent).toContainEqual({ type: 'hello', view: 'a' })
})

test('a view waits for its place', async () => {
  show('a')
  const element = place('a')
  await settled()
  expect(shown(element)).toContain('SmolLM2')
})

test('the same elements move when an output is drawn anew', async () => {
  const first = place('a')
  show('a')
  const host = first.querySelector('.llm-magic-live')
  first.remove()
  const second = place('a')
  await settled()
  expect(second.querySelector('.llm-magic-live')).toBe(host)
})

test('a view in two places is live in the first, and static in the other', async () => {
  const first = place('a')
  const second = place('a')
  show('a')
  await settled()
  expect(shown(first)).toContain('SmolLM2')
  expect(second.querySelector('.llm-magic-live')).toBeNull()
  expect(kept(second).hidden).toBe(false)
})

test('a place whose view nobody knows is asked for, once', async () => {
  place('lost')
  await settled()
  place('other')
  await settled()
  expect(sent).toEqual([
    { type: 'hello', view: 'lost' },
    { type: 'hello', view: 'other' },
  ])
})

test('places of other kernels are none of ours', async () => {
  const element = place('a')
  element.dataset.llmMagic = 'other/a'
  show('a')
  await settled()
  expect(element.querySelector('.llm-magic-live')).toBeNull()
})

test('a closed view shows what the notebook holds', () => {
  const element = place('a')
  show('a')
  hub.receive({ type: 'closed', view: 'a' })
  expect(element.querySelector('.llm-magic-live')).toBeNull()
  expect(kept(element).hidden).toBe(false)
})

test('another kind of state is another view', () => {
  const element = place('a')
  show('a')
  show('a', machine)
  expect(shown(element)).toContain('Laptop')
  expect(element.querySelectorAll('.llm-magic-live')).toHaveLength(1)
})

test('when the kernel ends every view says so, and a new state brings it back', () => {
  const element = place('a')
  show('a')
  hub.lose()
  expect(shown(element)).toContain('Model unloaded')
  show('a')
  expect(shown(element)).not.toContain('Model unloaded')
  expect(element.querySelectorAll('.llm-magic-live')).toHaveLength(1)
})

test('events of views that are not there are dropped', () => {
  const event: Event = { type: 'hello', view: 'nobody' }
  expect(() => hub.receive(event)).not.toThrow()
})

test('a message that no view can show leaves the static HTML', () => {
  const element = place('a')
  const warn = vi.spyOn(console, 'warn').mockImplementation(() => undefined)
  hub.receive({ type: 'state', view: 'a', state: { type: 'later version' } } as unknown as Event)
  expect(kept(element).hidden).toBe(false)
  warn.mockRestore()
})

test('a place that is there before its hub is asked for', () => {
  place('early')
  hub.dispose()
  hub = new Hub('key', command => sent.push(command))
  expect(sent).toEqual([{ type: 'hello', view: 'early' }])
})

// --- Views that the page does not show

const answer = { type: 'answer', model: 'qwen', placement: {}, bound_by: '', streams_text: true } as const
const job = (title: string): State => ({ type: 'job', title, plan: null })
const progress = (detail: string): Event => ({
  type: 'progress', view: 'a', phase: 'loading', done: 1, total: 2, unit: 'tensors', detail, elapsed_s: 1, left_s: 0,
})
const delta = (seq: number, text: string): Event => ({
  type: 'answer', view: 'a', seq, text, whole: false, phase: 'generating', done: 0, total: 0, unit: '', tokens: 0,
  elapsed_s: 0, first_token_s: 0, generation_tps: 0, tokens_per_sweep: 1,
})
const titles = () => [...document.querySelectorAll('.llm-magic-live')].map(host => host.shadowRoot?.querySelector('.head-title')?.textContent)

test('a view without a place is made when there is one, of the newest state', async () => {
  const made = vi.spyOn(views, 'showState')
  show('a', job('first'))
  show('a', job('second'))
  hub.receive(progress('x'))
  expect(made).not.toHaveBeenCalled()
  place('a')
  await settled()
  expect(made).toHaveBeenCalledTimes(1)
  expect(titles()).toEqual(['second'])
  expect(sent).toContainEqual({ type: 'hello', view: 'a' })
  made.mockRestore()
})

test('a view whose output was cleared costs nothing, and has the newest state when it is there again', async () => {
  const first = place('a')
  const { update, event, restore } = spied()
  show('a', job('first'))
  first.remove()
  await settled()
  show('a', job('second'))
  show('a', job('third'))
  hub.receive(progress('one'))
  hub.receive(progress('two'))
  hub.receive({ type: 'sweep', view: 'a', times: [] })
  expect([update.mock.calls.length, event.mock.calls.length]).toEqual([0, 0])
  const second = place('a')
  await settled()
  expect([update.mock.calls.length, event.mock.calls.length]).toEqual([1, 1])
  expect(shown(second)).toContain('third')
  expect(shown(second)).toContain('now: two')
  restore()
})

test('what counts is heard in its order, also where nobody sees it', async () => {
  const first = place('a')
  const { update, event, restore } = spied()
  show('a', job('first'))
  first.remove()
  await settled()
  show('a', job('second'))
  hub.receive({ type: 'applied', view: 'a', seq: 1, changed: 1, seconds: 1 })
  expect(update.mock.calls.length).toBe(1)
  expect(event.mock.calls.map(([heard]) => (heard as Event).type)).toEqual(['applied'])
  restore()
})

test('an answer loses no text while its output is away', async () => {
  const first = place('a')
  show('a', answer as unknown as State)
  hub.receive(delta(1, 'one '))
  first.remove()
  await settled()
  hub.receive(delta(2, 'two '))
  const second = place('a')
  await settled()
  hub.receive(delta(3, 'three'))
  expect(shown(second)).toContain('one two three')
})

// --- The kernel is gone

test('after a loss each view comes back by a state of its own', () => {
  const [one, other] = [place('a'), place('b')]
  show('a')
  show('b')
  hub.lose()
  show('a')
  expect(shown(one)).not.toContain('Model unloaded')
  expect(shown(other)).toContain('Model unloaded')
  show('b')
  expect(shown(other)).not.toContain('Model unloaded')
})

test('what comes for a lost view is nothing', () => {
  const element = place('a')
  show('a', job('first'))
  hub.lose()
  hub.receive(progress('late'))
  expect(shown(element)).not.toContain('late')
})

test('lost views stand as long as they are in the page; then nothing is left of the hub', async () => {
  const [one, other] = [place('a'), place('b')]
  const disconnect = vi.spyOn(MutationObserver.prototype, 'disconnect')
  vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] })
  show('a')
  show('b')
  hub.lose()
  one.remove()
  await Promise.resolve()
  vi.advanceTimersByTime(5000)
  expect(shown(other)).toContain('Model unloaded')
  expect(disconnect).not.toHaveBeenCalled()
  other.remove()
  await Promise.resolve()
  vi.advanceTimersByTime(5000)
  expect(other.querySelector('.llm-magic-live')).toBeNull()
  expect(disconnect).toHaveBeenCalled()
  vi.useRealTimers()
  disconnect.mockRestore()
})

test('an output that is drawn anew after a loss keeps its view', async () => {
  const first = place('a')
  show('a')
  hub.lose()
  first.remove()
  await settled()
  const second = place('a')
  await settled()
  expect(shown(second)).toContain('Model unloaded')
})

test('a connection that comes back says hello for what is shown, and for the rest when it is', async () => {
  place('a')
  const other = place('b')
  show('a')
  show('b')
  other.remove()
  await settled()
  sent.length = 0
  hub.reconnect()
  expect(sent).toEqual([{ type: 'hello', view: 'a' }])
  place('b')
  await settled()
  expect(sent).toEqual([{ type: 'hello', view: 'a' }, { type: 'hello', view: 'b' }])
  hub.lose()
  sent.length = 0
  hub.reconnect()
  expect(sent).toEqual([])
})

// --- A view that fails

test.each(['update', 'event'] as const)('a view that throws in %s makes way for the static HTML, and does not come back', async at => {
  const element = place('a')
  const warn = vi.spyOn(console, 'warn').mockImplementation(() => undefined)
  const spies = spied()
  spies[at].mockImplementation(() => {
    throw new Error('no')
  })
  show('a', job('first'))
  expect(() => (at === 'update' ? show('a', job('second')) : hub.receive(progress('x')))).not.toThrow()
  expect(warn).toHaveBeenCalled()
  expect(element.querySelector('.llm-magic-live')).toBeNull()
  expect(kept(element).hidden).toBe(false)
  show('a', job('third'))
  place('c')
  await settled()
  expect(element.querySelector('.llm-magic-live')).toBeNull()
  spies.restore()
  warn.mockRestore()
})

/** Watch what views are told. */
function spied() {
  const update = vi.fn<(state: State) => void>()
  const event = vi.fn<(event: Event) => void>()
  const real = views.showState
  const made = vi.spyOn(views, 'showState').mockImplementation((state, surroundings) => {
    const view = real(state, surroundings)
    if (!view) return undefined
    const { update: realUpdate, event: realEvent } = { update: view.update.bind(view), event: view.event.bind(view) }
    view.update = now => (update(now), realUpdate(now))
    view.event = now => (event(now), realEvent(now))
    return view
  })
  return { update, event, restore: () => made.mockRestore() }
}


test('a view that can stop something says hello until it is heard, or is gone', () => {
  vi.useFakeTimers()
  place('a')
  place('b')
  const hellos = (view: string) => sent.filter(c => c.type === 'hello' && c.view === view).length
  const job = { type: 'job', title: 'Loading', plan: null } as State
  show('a', job)
  show('b', map)
  const first = hellos('a')
  const ofMap = hellos('b')
  vi.advanceTimersByTime(1100)
  expect(hellos('a')).toBe(first + 2)
  expect(hellos('b')).toBe(ofMap)
  hub.receive({ type: 'hello', view: 'a' })
  vi.advanceTimersByTime(60_000)
  expect(hellos('a')).toBe(first + 2)
  show('c', job)
  place('c')
  hub.receive({ type: 'closed', view: 'c' })
  const closed = hellos('c')
  vi.advanceTimersByTime(60_000)
  expect(hellos('c')).toBe(closed)
  vi.useRealTimers()
})
