import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { Hub } from '../src/hub'
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
